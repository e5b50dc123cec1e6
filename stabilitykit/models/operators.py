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
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves

from stabilitykit.models import mode_flags

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
    autocast: frozenset[str]  # the backends on which autocasting changes its operands
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


# Parts of operators that have been autocast, and whose own kernels call some that could be once more.
_CAST_BEFORE = frozenset({"_cdist_forward", "_euclidean_dist"})

_DEVICES = ("CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1")
_BACKENDS = (*_DEVICES, "NestedTensorCPU", "NestedTensorCUDA", "MkldnnCPU")

_known: dict[int, Traits] = {}
_others: dict[int, Any] = {}  # by address too, and kept alive for it


def traits(func: Any) -> Traits:
    """By the function's address: hashing an operator runs Python code of torch's."""
    found = _known.get(id(func))
    if found is None:
        found = _known[id(func)] = _traits(func)
    return found


def _is_operator(func: Any) -> bool:
    """Whether torch's dispatcher knows it. A mode is also given others: queries of a device, functions of functions."""
    if id(func) not in _known and id(func) not in _others:
        known = isinstance(func, torch._ops.OpOverload) and torch._C._dispatch_has_kernel(func.name())  # type: ignore[no-untyped-call]
        if not known:
            _others[id(func)] = func
    return id(func) not in _others


def common_name(name: str) -> str:
    """One name for all variants of an operator: "matmul" for mm, bmm, addmm and linear."""
    return _SAME.get(name, name)


def _traits(func: Any) -> Traits:
    name: str = func._schema.name.partition("::")[2]
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    name = common_name(name)
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
        autocast=frozenset(backend for backend in _DEVICES if has_kernel(f"Autocast{backend}")),
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
    arguments of one before that. Views run as they are, unless `views` have `operator` run them too. What
    `operator` itself runs does not come back to it.
    """

    supports_higher_order_operators = True  # torch would else raise at one

    def __init__(
        self,
        operator: Callable[[Traits, tuple[Any, ...], dict[str, Any]], Any],
        *,
        apart: Callable[[Traits], bool] | None = None,
        given: Callable[[Traits, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]] | None = None,
        views: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._views = views
        self._operator = operator
        self._apart = apart
        self._given = given

    def __enter__(self) -> Self:
        with mode_flags.beginning():
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        with mode_flags.ending():
            super().__exit__(*raised)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard that True asks for imports the whole compiler, two seconds, on first use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_operator(func):
            return func(*args, **kwargs)
        kind = traits(func)
        if (
            kind.composite
            and (self._apart is None or self._apart(kind))
            and not (kind.own and _has_own_kernel(kind, args))
        ):
            if self._given is not None:
                args, kwargs = self._given(kind, args, kwargs)
            _push_mode(self)  # as `with self` does, without what torch notes of a mode that begins
            try:
                return _run_apart(kind, args, kwargs)
            finally:
                _pop_mode()
        if kind.view and not self._views:
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

    def __exit__(self, *raised: Any) -> None:
        """Takes itself off, if others that were put on later are still there too, as where tasks of asyncio overlap."""
        others: list[TorchDispatchMode] = []
        if any(mode is self for mode in _get_current_dispatch_mode_stack()):
            while _get_current_dispatch_mode_stack()[-1] is not self:
                others.append(_pop_mode())
        if others:
            for name, before in vars(self).items():  # what torch restores when the last one ends
                if name.startswith("old_") and name.endswith("_flags"):
                    vars(others[-1])[name][-1], before[-1] = before[-1], vars(others[-1])[name][-1]
        super().__exit__(*raised)
        for mode in reversed(others):
            _push_mode(mode)

    def _watch(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            state = self._before(kind, args, kwargs)
        except Exception as error:
            self._failed(kind, error)
            return _run_whole(kind, args, kwargs)
        output = _run_whole(kind, args, kwargs)
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


def _run_apart(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A composite's parts, with the dispatch keys that torch would have there, not with a mode's.

    In inference mode nothing of autograd's has run before; then views of weights still ask for gradients in its parts,
    which decides how a product is computed. Elsewhere, and where its results become views, such a kernel has.
    """
    # not `func.decompose`: that prefers formulas in Python, which give other bits than these kernels
    run, key = kind.func._op_dk, torch._C.DispatchKey.CompositeImplicitAutograd
    autocast = _in_autocast()
    inside = autocast and _autocast_inside(kind, args)
    if not torch.is_inference_mode_enabled() or kind.tracks_views:
        with _autocasting() if inside else _AS_IT_IS:
            return run(key, *args, **kwargs)
    with _as_called(), torch._C._DisableAutocast() if autocast and not inside else _AS_IT_IS:
        return run(key, *args, **kwargs)


def _run_whole(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator; what its kernel calls is autocast as without a mode."""
    if not _in_autocast():
        return kind.func(*args, **kwargs)
    with _autocasting() if _autocast_inside(kind, args) else _AS_IT_IS:
        return kind.func(*args, **kwargs)


def _in_autocast() -> bool:
    """Whether a block of autocasting is open, though it may turn it off: to a mode it seems off in any case."""
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return nesting > 1


def _autocast_inside(kind: Traits, args: tuple[Any, ...]) -> bool:
    """Whether operators inside this one are autocast: where that is on, and this one has not been autocast itself."""
    with _as_called():
        enabled = torch._C._is_any_autocast_enabled()
    return enabled and kind.name not in _CAST_BEFORE and _device(_first(args)) not in kind.autocast


def _autocasting() -> AbstractContextManager[None]:
    """Autocasting, as it was when the operator was called."""
    with _as_called():
        above = torch._C._dispatch_tls_local_exclude_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for device in _DEVICES:
        key = getattr(torch._C.DispatchKey, f"Autocast{device}")
        if not above.has(key):
            exclude = exclude.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)


def _as_called() -> AbstractContextManager[None]:
    """The dispatch keys that an operator was called with, before a mode got it."""
    return torch._C._RestorePythonTLSSnapshot()  # type: ignore[attr-defined, no-any-return]


_AS_IT_IS: AbstractContextManager[None] = nullcontext()


def _has_own_kernel(kind: Traits, args: tuple[Any, ...]) -> bool:
    """Whether the device of the first tensor has a kernel of this composite, which is what torch runs there."""
    first = _first(args)
    if first is None:
        return False
    device = _device(first)
    backend = f"NestedTensor{device}" if first.is_nested else f"Mkldnn{device}" if first.is_mkldnn else device
    return backend in kind.own


def _first(args: tuple[Any, ...]) -> Tensor | None:
    return next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), None)


def _device(tensor: Tensor | None) -> str:
    """As dispatch keys call it."""
    kind = "cpu" if tensor is None else tensor.device.type
    return "PrivateUse1" if kind == torch._C._get_privateuse1_backend_name() else kind.upper()


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
