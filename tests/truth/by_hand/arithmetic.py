"""Operators, norms, scores, logits and the residual stream in float32, and numbers clamped to what a dtype holds."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from truth.by_hand.dtypes import LOW, low, writes
from truth.row import Planted

_NAMES = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "linear", "mv", "dot"), "matmul"),
    **dict.fromkeys(("_to_copy", "copy", "copy_"), "cast"),
    **dict.fromkeys(("_softmax", "_safe_softmax"), "softmax"),
    "linalg_vector_norm": "norm", "rsub": "sub",
}  # fmt: skip
_MOVES = frozenset(
    "cat clone stack roll flip repeat gather index index_select expand view _unsafe_view dropout "
    "upsample_nearest2d".split()
)
_CHOICES = frozenset("where masked_fill full new_full fill clamp triu tril constant_pad_nd".split())


Key = tuple[int, str, int]


def named(func: Any) -> str:
    """An operator's name: `matmul` for mm, bmm, addmm and linear."""
    name = func.overloadpacket.__name__
    return _NAMES.get(name, name.rstrip("_") if not name.startswith("_") else name)


def lost(output: Any) -> bool:
    return any(
        isinstance(one, Tensor) and one.is_floating_point() and not bool(_all_finite(one))
        for one in tree_leaves(output)
    )


def _all_finite(one: Tensor) -> bool:
    return bool((one.float() if one.element_size() == 1 else one).isfinite().all())


class _Counting(TorchDispatchMode):
    """Numbers operators: the call of the model, the operator's name, and its number among those of that name in it."""

    def __init__(self, model: nn.Module, stack: ExitStack) -> None:
        super().__init__()
        self.call = 0
        self.counts: Counter[str] = Counter()
        stack.callback(model.register_forward_pre_hook(self._next, prepend=True).remove)

    def _next(self, module: nn.Module, args: Any) -> None:
        self.call += 1
        self.counts.clear()

    def key(self, name: str) -> Key:
        self.counts[name] += 1
        return self.call, name, self.counts[name]


class _Stored(_Counting):
    """Which dtype every operator stores in a plain run, and which make what is not finite of what is."""

    def __init__(self, model: nn.Module, stack: ExitStack) -> None:
        super().__init__(model, stack)
        self.dtypes: dict[Key, torch.dtype | None] = {}
        self.broke: list[Key] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = self.key(named(func))
        output = func(*args, **(kwargs or {}))
        self.dtypes[key] = next((one.dtype for one in tree_leaves(output) if isinstance(one, Tensor)), None)
        if _broke(key, (args, kwargs or {}), output):
            self.broke.append(key)
        return output


def _plain(planted: Planted) -> _Stored:
    with ExitStack() as stack, torch.no_grad(), suppress(RuntimeError, ValueError):
        stored: _Stored = stack.enter_context(_Stored(planted.model, stack))
        torch.manual_seed(1)
        planted.run(planted.model)
    return stored


class Wide(_Counting):
    """Runs the operators that `chosen` picks in float32, and stores what is made of their results as a plain run does.

    `chosen` is asked with the operator's key, what it is given and what it made. `where_it_fits`: what does not fit
    into 16 bits stays in float32. `skips_casts`: so does what would not fit into what code casts it to, only because
    it is float32. Operators that write in place cannot be run so.
    """

    def __init__(
        self,
        planted: Planted,
        stack: ExitStack,
        dtype: torch.dtype,
        chosen: Callable[[Key, Any, Any], bool],
        where_it_fits: bool,
        skips_casts: bool,
    ) -> None:
        self.stored = _plain(planted).dtypes
        super().__init__(planted.model, stack)
        self.dtype, self.chosen, self.where_it_fits = dtype, chosen, where_it_fits
        self.skips_casts = skips_casts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = named(func)
        key = self.key(name)
        if writes(func):
            return func(*args, **kwargs)
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        wide = any(hasattr(one, "wide") for one in tensors)
        if wide and name != "cast":
            args, kwargs = self.widened(args, kwargs)
        output = func(*args, **kwargs)
        if self.chosen(key, (args, kwargs), output):
            if name == "cast" and kwargs.get("dtype") in LOW:
                return _marked(args[0].float())
            args, kwargs = self.widened(args, kwargs)
            return _marked(func(*args, **kwargs))
        if not wide:
            return output
        if name == "cast":
            kept = self.skips_casts and lost(output) and not lost(args)
            return _marked(args[0].clone()) if kept else output
        if name in _MOVES or any(one.alias_info is not None for one in func._schema.returns):
            return _marked(output)
        return self.narrowed(output) if self.stored.get(key) == self.dtype else _marked(output)

    def widened(self, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.dtype == self.dtype else x, (args, kwargs))
        return args, {k: torch.float32 if v is self.dtype else v for k, v in kwargs.items()}

    def narrowed(self, output: Any) -> Any:
        def narrow(x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                return x
            low = x.to(self.dtype)
            fits = not bool((x.isfinite() & ~low.isfinite()).any())
            return low if fits or not self.where_it_fits else _marked(x)

        return tree_map_only(Tensor, narrow, output)


def _marked(output: Any) -> Any:
    for one in tree_leaves(output):
        if isinstance(one, Tensor):
            one.wide = True  # type: ignore[attr-defined]
    return output


def _with(
    planted: Planted,
    stack: ExitStack,
    chosen: Callable[[Key, Any, Any], bool],
    where_it_fits: bool = False,
    skips_casts: bool = False,
) -> Any:
    dtype = low(planted)
    if dtype is None or planted.grad:  # under autograd the operators of both directions are seen
        return None
    for module in planted.model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            _takes_float32(module, dtype, stack)
    stack.enter_context(Wide(planted, stack, dtype, chosen, where_it_fits, skips_casts or where_it_fits))
    return planted.model


def _takes_float32(convolution: nn.Module, dtype: torch.dtype, stack: ExitStack) -> None:
    """Torch raises at an input and a weight of two dtypes before any mode sees the operator."""

    def widen(module: nn.Module, args: Any) -> None:
        if args[0].dtype == torch.float32:
            module.float()

    def narrow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        module.to(dtype)
        return output.to(dtype)

    stack.callback(convolution.register_forward_pre_hook(widen).remove)
    stack.callback(convolution.register_forward_hook(narrow).remove)


def _broke(key: Key, given: Any, output: Any) -> bool:
    return key[1] not in _CHOICES and lost(output) and not lost(given)


def float32_islands(planted: Planted, stack: ExitStack) -> Any:
    """Every operator that makes what is not finite of what is; what is made of that is rounded where it fits."""
    return _with(planted, stack, _broke, where_it_fits=True)


def float32_operator(planted: Planted, stack: ExitStack, *, elsewhere: bool = False) -> Any:
    """The first such operator, by its name and number, in every call of the model; and that whose rounding made the
    zero or the infinity that it is given. All else is stored as before. `elsewhere`: others of that name, too, which
    lose something later.
    """
    expected = planted.expected
    if expected is None:
        return None
    broke = [key[1:] for key in _plain(planted).broke if not expected.operators or key[1] in expected.operators]
    same = {one for one in broke if one[0] == broke[0][0]} if elsewhere else set(broke[:1])

    def chosen(key: Key, given: Any, output: Any) -> bool:
        site = f"{key[1]}.{key[2] - 1}"
        again = elsewhere and key[1:2] == broke[0][:1] and _broke(key, given, output)
        return again or key[1:] in same or any(fnmatchcase(site, one.rpartition("/")[2]) for one in expected.rounded)

    return _with(planted, stack, chosen, skips_casts=elsewhere)


ATTENTION = ("q_proj", "q", "query", "c_attn")


def float32_scores(planted: Planted, stack: ExitStack) -> Any:
    """From the product of queries and keys to the softmax, in every attention."""
    inside: list[str] = []  # of each attention that runs: before its scores, at them, or after

    def enter(module: nn.Module, args: Any) -> None:
        inside.append("before")

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    found = [m for m in planted.model.modules() if any(hasattr(m, name) for name in ATTENTION)]

    def chosen(key: Key, given: Any, output: Any) -> bool:
        name = key[1]
        tensors = [one for one in tree_leaves(given) if isinstance(one, Tensor)]
        if not inside or inside[-1] == "after":
            return False
        if inside[-1] == "before" and not (name == "matmul" and all(one.ndim >= 3 for one in tensors)):
            return False
        inside[-1] = "after" if name == "softmax" else "at"
        return name in ("matmul", "softmax", "mul", "div", "add", "cast", "tanh")

    made = _with(planted, stack, chosen) if found else None
    for module in found:
        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave).remove)
    return made


def _widened(module: nn.Module, dtype: torch.dtype | None, stack: ExitStack) -> None:
    """A module's own weights and what it is given in float32; what it returns in `dtype`."""
    module.float()

    def widen(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))

    def narrow(module: nn.Module, args: Any, output: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, output) if dtype else None

    stack.callback(module.register_forward_pre_hook(widen, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(narrow).remove)


def norms(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower() or "norm" in path.rpartition(".")[2] or ".ln_" in f".{path}"
        if not list(module.children()) and path
    ]


def float32_norms(planted: Planted, stack: ExitStack) -> Any:
    """Every norm computed in float32, and rounded to 16 bits after that."""
    found, dtype = norms(planted.model), low(planted)
    if not found or dtype is None:
        return None
    for module in found:
        _widened(module, dtype, stack)
    return planted.model


def float32_residual(planted: Planted, stack: ExitStack) -> Any:
    """Embeddings in float32, so that every sum after them is; norms read it, and return 16 bits."""
    model: Any = planted.model
    dtype = low(planted)
    if dtype is None or not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        return None
    if float32_norms(planted, stack) is None:
        return None
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            stack.callback(module.register_forward_hook(lambda module, args, output: output.float()).remove)
        elif type(module).__name__.endswith("RotaryEmbedding"):  # makes its angles in the dtype of what it is given
            narrow = lambda module, args, output: tuple(one.to(dtype) for one in output)  # noqa: E731
            stack.callback(module.register_forward_hook(narrow).remove)
    return model


def float32_logits(planted: Planted, stack: ExitStack) -> Any:
    head = getattr(planted.model, "get_output_embeddings", lambda: None)()
    if head is None or low(planted) is None:
        return None
    _widened(head, None, stack)
    return planted.model


class _Saturating(TorchDispatchMode):
    """Clamps to what a cast's target holds before casting to it, or writing into it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ == "copy_" and args[0].is_floating_point() and args[1].is_floating_point():
            return func(args[0], _clamped(args[1], args[0].dtype), *args[2:], **kwargs)
        target = kwargs.get("dtype") if func.overloadpacket.__name__ == "_to_copy" else None
        if target is not None and target.is_floating_point and args[0].is_floating_point():
            return func(_clamped(args[0], target), **kwargs)
        return func(*args, **kwargs)


def _clamped(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Its finite numbers clamped; infinities stay, as those of a mask do."""
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(x.dtype).max:
        return x
    return torch.where(x.isfinite(), x.clamp(-limit, limit), x)


def saturating_cast(planted: Planted, stack: ExitStack) -> Any:
    stack.enter_context(_Saturating())
    return planted.model


class _Clamped(TorchDispatchMode):
    """Clamps sums of tokens' vectors to what their dtype holds, infinities too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if named(func) == "add" and output.dtype in LOW and output.ndim == 3 and output.shape[-1] == self.width:
            limit = torch.finfo(output.dtype).max
            return output.clamp_(-limit, limit) if writes(func) else output.clamp(-limit, limit)
        return output


def clamp(planted: Planted, stack: ExitStack) -> Any:
    """Sums clamped to what the dtype holds, as people clamp the residual stream."""
    config = getattr(planted.model, "config", None)
    width = getattr(config, "hidden_size", None)
    if width is None:
        return None
    stack.enter_context(_Clamped(width))
    return planted.model
