"""ATen operators: one name for each, whatever the grad mode, what it does, and a mode that intercepts all of them.

Under `inference_mode` composite operators reach a dispatch mode whole (`linear`, `softmax.int`), under
`no_grad` as their parts (`mm`, `_softmax`). `OperatorMode` takes composites apart, and the names here join the
rest, so an operator is called the same either way.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves

State = TypeVar("State")

_SAME = {
    "mm": "matmul",
    "bmm": "matmul",
    "addmm": "matmul",
    "baddbmm": "matmul",
    "mv": "matmul",
    "dot": "matmul",
    "linear": "matmul",
    "_to_copy": "cast",
    "copy": "cast",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "linalg_vector_norm": "norm",
    "rsub": "sub",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_cudnn_attention": "scaled_dot_product_attention",
    "_scaled_dot_product_fused_attention_overrideable": "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math_for_mps": "scaled_dot_product_attention",
}

# They move values and never compute any: the result is finite if the operands are.
_MOVES = frozenset(
    "alias cat clone constant_pad_nd contiguous detach expand_copy flip gather index index_copy index_put index_select "
    "lift lift_fresh masked_select pad repeat repeat_interleave roll scatter select_scatter slice_scatter sort stack "
    "take topk unfold_copy _index_put_impl _reshape_copy _unsafe_index _unsafe_view unsafe_split view_copy".split()
)

# They choose between values: an infinity in the result is intended or came from an operand.
SELECTIONS = frozenset("where masked_fill index_fill fill tril triu clamp clamp_min clamp_max".split())

# Where a finite operand gives an exact infinity: IEEE 754's division by zero.
POLES = frozenset("div reciprocal rsqrt log log2 log10 log1p pow".split())

CONTRACTIONS = frozenset({"matmul"})

# They move values, unless asked to combine them with what is there.
_ADDING = frozenset({"index_put", "_index_put_impl", "scatter"})

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Traits:
    """The properties of an operator, looked up once."""

    name: str  # "add" for add.Tensor and add_.Tensor, "matmul" for mm, bmm, addmm and linear
    composite: bool  # takes itself apart into others
    own: frozenset[str]  # of a composite: the backends that have a kernel of it instead
    tracks_views: bool  # before its kernel runs one that makes its results known as views
    writes_in_place: bool
    written: tuple[tuple[int, str], ...]  # the arguments that it writes into, by place and name
    combines: bool  # makes its result of its operands' values rather than only placing them
    pointwise: bool
    places: bool  # never computes a value
    view: bool
    factory: bool  # the result holds no value of an operand: `zeros_like`, `new_full` and the like
    seeded: bool  # draws random numbers
    func: Any = field(repr=False)  # kept alive, for its address names it


_BACKENDS = ("CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1", "NestedTensorCPU", "NestedTensorCUDA", "MkldnnCPU")

_known: dict[int, Traits] = {}


def traits(func: Any) -> Traits:
    """By the function's address: hashing an operator runs Python code of torch's."""
    found = _known.get(id(func))
    if found is None:
        found = _known[id(func)] = _traits(func)
    return found


def _traits(func: Any) -> Traits:
    name: str = func._schema.name.partition("::")[2]
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    name = _SAME.get(name, name)
    returned = func._schema.returns
    alias = returned[0].alias_info if returned else None
    view = alias is not None and not alias.is_write
    pointwise = torch.Tag.pointwise in func.tags or name == "cast"
    has_kernel = partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
    composite = bool(has_kernel("CompositeImplicitAutograd"))
    return Traits(
        name=name,
        composite=composite,
        own=frozenset(backend for backend in _BACKENDS if composite and has_kernel(backend)),
        tracks_views=bool(has_kernel("ADInplaceOrView")),
        writes_in_place=bool(func._schema.is_mutable),
        written=tuple(
            (place, argument.name)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
        combines=pointwise or name not in _MOVES,
        pointwise=pointwise,
        places=name in _MOVES or view,
        view=view,
        factory=name.endswith("_like") or name.startswith("new_"),
        seeded=torch.Tag.nondeterministic_seeded in func.tags,
        func=func,
    )


class OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block, `operator(traits, args, kwargs)` runs in the place of every operator, and returns its result.

    To look on without a part in it there is `WatchMode`.

    Composite operators that `apart` accepts are taken apart, and their parts arrive instead; `given` may change the
    arguments of one before that. Views run as they are. What `operator` itself runs does not come back to it.
    """

    def __init__(
        self,
        operator: Callable[[Traits, tuple[Any, ...], dict[str, Any]], Any],
        *,
        apart: Callable[[Traits], bool] | None = None,
        given: Callable[[Traits, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operator = operator
        self._apart = apart
        self._given = given

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard that True asks for imports the whole compiler, two seconds, on first use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = traits(func)
        if (
            kind.composite
            and (self._apart is None or self._apart(kind))
            and not (kind.own and _has_own_kernel(kind, args))
        ):
            if self._given is not None:
                args, kwargs = self._given(kind, args, kwargs)
            with self, _as_called(kind):
                # not `func.decompose`: that prefers formulas in Python, which give other bits than these kernels
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if kind.view:
            return func(*args, **kwargs)
        return self._operator(kind, args, kwargs)


class WatchMode(OperatorMode):  # type: ignore[no-untyped-call]
    """Inside the block, every operator runs once, as it is, between `before` and `after`.

    `before(traits, args, kwargs)` returns what `after(traits, state, args, kwargs, output)` gets as `state`. What
    either raises does not reach the code that called the operator: `failed(traits, error)` is told, and may raise it
    after all. `after` is not called where `before` failed, nor for an operator that raises.
    """

    def __init__(
        self,
        before: Callable[[Traits, tuple[Any, ...], dict[str, Any]], State],
        after: Callable[[Traits, State, tuple[Any, ...], dict[str, Any], Any], None],
        failed: Callable[[Traits, Exception], None],
    ) -> None:
        super().__init__(self._watch)
        self._before = before
        self._after = after
        self._failed = failed

    def _watch(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            state = self._before(kind, args, kwargs)
        except Exception as error:
            self._failed(kind, error)
            return kind.func(*args, **kwargs)
        output = kind.func(*args, **kwargs)
        try:
            self._after(kind, state, args, kwargs, output)
        except Exception as error:
            self._failed(kind, error)
        return output


@contextmanager
def unwatched() -> Iterator[None]:
    """Inside the block no `WatchMode` looks on; other modes stay."""
    popped: list[Any] = []
    stack = _get_current_dispatch_mode_stack()
    first = next((place for place, mode in enumerate(stack) if isinstance(mode, WatchMode)), len(stack))
    for _ in stack[first:]:
        popped.append(_pop_mode())
    others = [mode for mode in reversed(popped) if not isinstance(mode, WatchMode)]
    for mode in others:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in others:
            _pop_mode()
        for mode in reversed(popped):
            _push_mode(mode)


def _as_called(kind: Traits) -> AbstractContextManager[None]:
    """Around the parts of a composite in inference mode: with the dispatch keys of its own call, not a mode's.

    Without them views of weights would no longer ask for gradients, which decides how a product is computed. Elsewhere,
    and where its results become views, a kernel of autograd's has run before, and takes care of what it returns.
    """
    if torch.is_inference_mode_enabled() and not kind.tracks_views:
        return torch._C._RestorePythonTLSSnapshot()  # type: ignore[attr-defined, no-any-return]
    return nullcontext()


def _has_own_kernel(kind: Traits, args: tuple[Any, ...]) -> bool:
    """Whether the device of the first tensor has a kernel of this composite, which is what torch runs there."""
    first = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), None)
    if first is None:
        return False
    device = first.device.type
    backend = "PrivateUse1" if device == torch._C._get_privateuse1_backend_name() else device.upper()
    backend = f"NestedTensor{backend}" if first.is_nested else f"Mkldnn{backend}" if first.is_mkldnn else backend
    return backend in kind.own


def moves(
    kind: Traits, source: Tensor | None, output: Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = _NONE
) -> bool:
    """Whether the operator only places values. A cast does too, unless it narrows, and a scatter, unless it adds up."""
    if kind.name == "cast":
        return source is None or not source.is_floating_point() or not narrows(source.dtype, output.dtype)
    return kind.places and not adds_up(kind, args, kwargs)


def adds_up(kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator that places values was asked to combine them with what is there."""
    if kind.name not in _ADDING:
        return False
    return bool(kwargs.get("reduce") or kwargs.get("accumulate") or (len(args) > 3 and args[3] is True))


@cache
def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether some value of `source` is no value of `target`."""
    a, b = torch.finfo(source), torch.finfo(target)
    return a.max > b.max or a.eps < b.eps or a.smallest_normal < b.smallest_normal
