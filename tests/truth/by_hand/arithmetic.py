"""Operators, norms, scores, logits and the residual stream in float32, and numbers clamped to what a dtype holds."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
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
_CHOICES = frozenset("where masked_fill full new_full fill clamp triu tril constant_pad_nd".split())


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


class Wide(TorchDispatchMode):
    """Runs the operators that `chosen` picks in float32. What others make of that is rounded to 16 bits where it fits.

    `chosen` is asked with the operator's name, its number among those of that name in this call of the model, and what
    it was given and made. Of operators that write in place none can be run so.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, chosen: Callable[[str, int, Any, Any, Any], bool]) -> None:
        super().__init__()
        self.dtype, self.chosen = dtype, chosen
        self.counts: Counter[str] = Counter()
        self.used = False
        self.handle = model.register_forward_pre_hook(lambda module, args: self.counts.clear(), prepend=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = named(func)
        number = self.counts[name]
        self.counts[name] += 1
        if writes(func):
            return func(*args, **kwargs)
        dtypes = {one.dtype for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        mixed = self.used and torch.float32 in dtypes and self.dtype in dtypes
        if mixed:
            args, kwargs = self.widened(args, kwargs)
        output = func(*args, **kwargs)
        if self.chosen(name, number, args, kwargs, output):
            self.used = True
            if name == "cast" and kwargs.get("dtype") in LOW:
                return args[0].float()
            args, kwargs = self.widened(args, kwargs)
            return func(*args, **kwargs)
        if self.used and name == "cast" and kwargs.get("dtype") == self.dtype and lost(output) and not lost(args):
            return args[0]
        return self.rounded(output) if mixed else output

    def widened(self, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.dtype == self.dtype else x, (args, kwargs))
        return args, {k: torch.float32 if v is self.dtype else v for k, v in kwargs.items()}

    def rounded(self, output: Any) -> Any:
        def narrow(x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                return x
            low = x.to(self.dtype)
            return x if lost(low) and not lost(x) else low

        return tree_map_only(Tensor, narrow, output)


def _with(planted: Planted, stack: ExitStack, chosen: Callable[[str, int, Any, Any, Any], bool]) -> Any:
    dtype = low(planted)
    if dtype is None or planted.grad:  # under autograd the operators of both directions are seen
        return None
    mode = Wide(planted.model, dtype, chosen)
    stack.callback(mode.handle.remove)
    stack.enter_context(mode)
    return planted.model


def _broke(name: str, args: Any, kwargs: Any, output: Any) -> bool:
    return name not in _CHOICES and lost(output) and not lost((args, kwargs))


def float32_islands(planted: Planted, stack: ExitStack) -> Any:
    """Every operator that makes what is not finite of what is."""
    return _with(planted, stack, lambda name, number, args, kwargs, output: _broke(name, args, kwargs, output))


def float32_operator(planted: Planted, stack: ExitStack) -> Any:
    """The first such operator, by its name and number, in every call of the model."""
    expected = planted.expected.operators if planted.expected else ()
    found: list[tuple[str, int]] = []

    def chosen(name: str, number: int, args: Any, kwargs: Any, output: Any) -> bool:
        if not found and (not expected or name in expected) and _broke(name, args, kwargs, output):
            found.append((name, number))
        return bool(found) and found[0] == (name, number)

    return _with(planted, stack, chosen)


ATTENTION = ("q_proj", "q", "query", "c_attn")


def float32_scores(planted: Planted, stack: ExitStack) -> Any:
    """From the product of queries and keys to the softmax, in every attention."""
    inside: list[bool] = []  # for each attention that runs, whether its softmax is still to come

    def enter(module: nn.Module, args: Any) -> None:
        inside.append(True)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    found = [m for m in planted.model.modules() if any(hasattr(m, name) for name in ATTENTION)]
    for module in found:
        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave).remove)

    def chosen(name: str, number: int, args: Any, kwargs: Any, output: Any) -> bool:
        if not inside or not inside[-1]:
            return False
        tensors = [one for one in tree_leaves(args) if isinstance(one, Tensor)]
        started = name == "matmul" and all(one.ndim >= 3 for one in tensors)
        follows = any(one.dtype == torch.float32 for one in tensors) and name in (
            "mul",
            "div",
            "add",
            "softmax",
            "cast",
        )
        if name == "softmax":
            inside[-1] = False
            return any(one.dtype in LOW for one in tensors)
        return started or (follows and any(one.dtype in LOW for one in tensors))

    return _with(planted, stack, chosen) if found else None


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


class _Clamped(TorchDispatchMode):
    """Clamps what the operators of one name make infinite."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if named(func) != self.name or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        if self.name == "cast" and func.overloadpacket.__name__ != "_to_copy":
            return output
        if lost(output) and not lost((args, kwargs or {})):
            limit = torch.finfo(output.dtype).max
            if self.name == "cast":
                return func(args[0].clamp(-limit, limit), *args[1:], **(kwargs or {}))
            return output.clamp(-limit, limit)
        return output


def saturating_cast(planted: Planted, stack: ExitStack) -> Any:
    """Numbers clamped to what a cast's target holds, before they are cast."""
    stack.enter_context(_Clamped("cast"))
    return planted.model


def clamp(planted: Planted, stack: ExitStack) -> Any:
    """Sums clamped to what the dtype holds, as people clamp the residual stream."""
    if not hasattr(planted.model, "config"):
        return None
    stack.enter_context(_Clamped("add"))
    return planted.model
