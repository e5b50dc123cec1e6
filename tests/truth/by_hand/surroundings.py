"""What a model is run with: its mask, its padding, its cache, its attention, and the settings of its generation."""

import copy
import inspect
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Cache, DynamicCache

from truth.by_hand import Change
from truth.by_hand.arithmetic import ATTENTION, named
from truth.by_hand.dtypes import LOW, low
from truth.decoding import Compressed, EightBits
from truth.row import Planted

# Masks


def _masks(model: Any, args: Any, kwargs: Any, to: Callable[[Tensor], Tensor]) -> Any:
    """The call's arguments, and of those that are masks the floating tensors changed."""
    names = list(inspect.signature(model.forward).parameters)
    change = lambda one: tree_map_only(Tensor, lambda x: to(x) if x.is_floating_point() else x, one)  # noqa: E731
    masks = lambda name: "mask" in name or name == "other"  # noqa: E731
    found = [change(one) if masks(name) else one for one, name in zip(args, names, strict=False)]
    return tuple(found), {name: change(one) if masks(name) else one for name, one in kwargs.items()}


def _half(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).min / 2)


class _HalfMinimum(TorchDispatchMode):
    """Where a choice or a fill in the model puts -inf or the minimum, it puts half of the minimum."""

    def __init__(self, model: nn.Module, stack: ExitStack) -> None:
        super().__init__()
        self.inside = 0
        stack.callback(model.register_forward_pre_hook(lambda *_: self.count(1)).remove)
        stack.callback(model.register_forward_hook(lambda *_: self.count(-1), always_call=True).remove)

    def count(self, change: int) -> None:
        self.inside += change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        fills = self.inside and named(func) in ("masked_fill", "where", "full", "new_full")
        is_float = isinstance(output, Tensor) and output.dtype in (*LOW, torch.float32)
        return _half(output) if fills and is_float else output


def half_minimum(planted: Planted, stack: ExitStack) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        return _masks(module, args, kwargs, _half)

    stack.callback(planted.model.register_forward_pre_hook(hook, with_kwargs=True).remove)
    stack.enter_context(_HalfMinimum(planted.model, stack))
    return planted.model


def float32_mask(planted: Planted, stack: ExitStack) -> Any:
    """The mask in float32 where it is added to scores, and so they are."""
    dtype = low(planted)
    if dtype is None or planted.grad:
        return None
    used: list[bool] = []

    def to(x: Tensor) -> Tensor:
        used.append(True)
        return x.float()

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        return _masks(module, args, kwargs, to)

    attentions = [one for one in planted.model.modules() if any(hasattr(one, name) for name in ATTENTION)]
    for module in attentions or [planted.model]:
        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
    stack.enter_context(_Promoted())
    return planted.model if _does(planted, used) else None


class _Promoted(TorchDispatchMode):
    """Products take operands of one dtype: the wider one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtypes = {one.dtype for one in tree_leaves(args) if isinstance(one, Tensor)}
        if named(func) == "matmul" and torch.float32 in dtypes and len(dtypes) > 1:
            args = tree_map_only(Tensor, Tensor.float, args)
        return func(*args, **(kwargs or {}))


# Padding


def without_padding(planted: Planted, stack: ExitStack) -> Any:
    """Each row of a batch alone, without its padding. Where there was padding the logits are float32's, so that only
    what is no padding counts.
    """
    model: Any = planted.model
    wide = copy.deepcopy(model).float()
    forward = model.forward
    used: list[bool] = []

    def alone(*args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if (
            not isinstance(ids, Tensor)
            or not isinstance(mask, Tensor)
            or mask.ndim != 2
            or bool(mask.all())
            or not bool(mask.any(-1).all())
        ):
            return forward(*args, **kwargs)
        used.append(True)
        whole = wide(**given)
        answers = []
        for row, keep in enumerate(mask.bool()):
            own = {name: _cut(one, row, keep) for name, one in given.items()}
            answers.append(forward(**own))
        if isinstance(whole, Tensor):  # one vector a text
            return torch.cat(answers)
        logits = whole.logits.to(answers[0].logits.dtype)
        for row, keep in enumerate(mask.bool()):
            logits[row, keep] = answers[row].logits[0]
        return SimpleNamespace(logits=logits)

    model.forward = alone
    with torch.no_grad():
        try:
            planted.run(model)
        except (RuntimeError, ValueError):
            return None
    return model if used else None


def _cut(one: Any, row: int, keep: Tensor) -> Any:
    return one[row : row + 1, keep] if isinstance(one, Tensor) and one.shape[-1:] == keep.shape else one


# Caches


def zero_filled_cache(planted: Planted, stack: ExitStack) -> Any:
    """0 in every slot of a cache that holds no finite number when the model is called."""
    used: list[bool] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("past_key_values")
        for layer in cache.layers if isinstance(cache, Cache) else ():
            for one in (layer.keys, layer.values):
                if isinstance(one, Tensor) and one.numel() and not bool(one.isfinite().all()):
                    used.append(True)
                    one.nan_to_num_(0.0, 0.0, 0.0)

    handle = planted.model.register_forward_pre_hook(hook, with_kwargs=True)
    stack.callback(handle.remove)
    return planted.model if _does(planted, used) else None


def _does(planted: Planted, used: list[bool]) -> bool:
    """Whether a run makes use of a change that was made for it."""
    with torch.no_grad(), suppress(RuntimeError, ValueError):
        planted.run(planted.model)
    return bool(used)


def _patched(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    old = owner.__dict__[name]
    setattr(owner, name, value)
    stack.callback(setattr, owner, name, old)


def plain_cache(planted: Planted, stack: ExitStack) -> Any:
    """transformers' own DynamicCache, whatever cache was passed or asked for."""
    used: list[bool] = []

    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        used.append(True)
        return DynamicCache.update(self, *args, **kwargs)

    for owner in (EightBits, Compressed):
        _patched(stack, owner, "update", update)
    _generating(planted, stack, used, cache_implementation=None)
    return planted.model if _does(planted, used) else None


def rescaled_cache(planted: Planted, stack: ExitStack) -> Any:
    """A cache in a narrow format keeps a scale for each tensor, so that its largest number fits."""
    used: list[bool] = []

    def through(self: Any, x: Tensor) -> Tensor:
        if not self.stored.is_floating_point:
            return plain(self, x)
        used.append(True)
        scale = (x.abs().amax().float() / torch.finfo(self.stored).max).clamp(min=1e-12)
        return ((x.float() / scale).to(self.stored).float() * scale).to(x.dtype)

    plain = EightBits._through
    _patched(stack, EightBits, "_through", through)
    return planted.model if _does(planted, used) else None


# Attention


def attention(name: str) -> Change:
    def change(planted: Planted, stack: ExitStack) -> Any:
        model: Any = planted.model
        inner = [m for m in model.modules() if hasattr(m, "set_attn_implementation") and hasattr(m, "config")]
        found = [m for m in inner if getattr(m.config, "_attn_implementation", None) not in (None, name)]
        if not found:
            return None
        for one in inner:
            try:
                one.set_attn_implementation(name)
            except ValueError:  # an architecture without it
                return None
        return model

    return change


# Settings of generation


def _generating(planted: Planted, stack: ExitStack, used: list[bool], **how: Any) -> None:
    """`generate` called with other settings."""
    model: Any = planted.model
    if not hasattr(model, "generate"):
        return
    generate = model.generate

    def changed(*args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name, "nothing") != value for name, value in how.items()):
            used.append(True)
        return generate(*args, **kwargs | how)

    model.generate = changed


def settings(**how: Any) -> Change:
    def change(planted: Planted, stack: ExitStack) -> Any:
        used: list[bool] = []
        _generating(planted, stack, used, **how)
        return planted.model if _does(planted, used) else None

    return change


def without_processor(name: str) -> Change:
    def change(planted: Planted, stack: ExitStack) -> Any:
        model: Any = planted.model
        made = model._get_logits_processor

        def fewer(*args: Any, **kwargs: Any) -> Any:
            processors = made(*args, **kwargs)
            return type(processors)([one for one in processors if type(one).__name__ != name])

        model._get_logits_processor = fewer
        return model

    return change
