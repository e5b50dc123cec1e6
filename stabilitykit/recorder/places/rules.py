"""What each operator does with labels: one rule for every kind of operator whose effect shapes and arguments tell.

A rule gets a `Request` and returns the labels of the results. An operator without a rule gives results of which nothing
is known but what they may depend on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.models.operators import Traits
from stabilitykit.recorder.places.labels import (
    NONE,
    OPEN,
    ZERO,
    Array,
    Labels,
    beyond,
    blank,
    changed,
    labels,
    spread,
)
from stabilitykit.recorder.places.memory import contiguous, view
from stabilitykit.recorder.places.merge import merged, mixed_along, product, reduced

Rule = Callable[["Request"], "Sequence[Labels | None]"]


@dataclass(slots=True)
class Request:
    """One call of an operator: its arguments by name, the labels of a tensor, the shapes of its results.

    `hidden` is what the scores that it returns hold of later keys, and `checks` what has to hold for that. `newest`:
    the step has one new position only, so that whatever depends on it belongs to it.
    """

    kind: Traits
    given: Mapping[str, Any]
    of: Callable[[Tensor], Labels]
    shapes: Sequence[tuple[int, ...]]
    hidden: int = OPEN
    checks: int = 0
    newest: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for value in self.given.values():
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, list | tuple):
                found += [one for one in value if isinstance(one, Tensor)]
        return found

    def labels(self, name: str) -> Labels | None:
        tensor = self.given.get(name)
        return self.of(tensor) if isinstance(tensor, Tensor) else None

    @property
    def own(self) -> Labels:
        """Of the first tensor."""
        return self.of(self.tensors[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]


RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return add


def unknown(request: Request) -> Sequence[Labels]:
    parts = [request.of(tensor) for tensor in request.tensors]
    return [spread(parts, shape) for shape in request.shapes]


@rule(
    "where masked_fill clamp clamp_min clamp_max nan_to_num hardswish hardsigmoid rrelu_with_noise rrelu dropout "
    "native_dropout bernoulli polar complex log_sigmoid_forward prelu _prelu_kernel lerp cast fill rsub sub add mul "
    "div floor_divide tril triu masked_scatter _native_batch_norm_legit_no_training"
)
def pointwise(request: Request) -> Sequence[Labels]:
    parts = [request.of(tensor) for tensor in request.tensors]
    return [_with(merged(_broadcast(parts, shape), shape), request) for shape in request.shapes]


def _is_newest(of: Labels) -> bool:
    """Whether all of it belongs to the first position of this step."""
    return of.position is not None and not of.position.dims and of.position.low == 0


def _broadcast(parts: Sequence[Labels], shape: tuple[int, ...]) -> list[Labels]:
    """Those that broadcast; the others only count as what the result depends on."""
    found = []
    for part in parts:
        own = part.shape
        matches = len(own) <= len(shape) and all(
            n in (1, m) for n, m in zip(own, shape[len(shape) - len(own) :], strict=True)
        )
        found.append(part if matches else spread([part], ()))
    return found


def _with(found: Labels, request: Request) -> Labels:
    if request.hidden == OPEN or found.key is None:
        return found
    return labels(
        found.shape,
        found.row,
        found.position,
        found.key,
        slot=found.slot,
        key_slot=found.key_slot,
        bounds=dict(found.bounds),
        checks=found.checks | request.checks,
        hidden=request.hidden,
        raw=found.raw,
    )


@rule("clone contiguous lift lift_fresh detach alias _unsafe_view _reshape_copy view_copy reshape expand_copy")
def moved_whole(request: Request) -> Sequence[Labels]:
    own = request.own
    if own.shape == request.shape:
        return [own]
    return [view(own, request.shape, contiguous(request.shape), 0)]


@rule("matmul _grouped_mm _scaled_mm _int_mm linear")
def contraction(request: Request) -> Sequence[Labels]:
    """`[..., M, K] @ [..., K, N]`; the weights of `linear` are `[N, K]`; a vector has a dimension missing."""
    name = request.kind.func._schema.name.partition("::")[2]
    tensors = request.tensors
    added = request.labels("bias") if name == "linear" else None
    if name in ("addmm", "baddbmm", "addmv", "addbmm"):
        added, tensors = request.of(tensors[0]), tensors[1:]
    left = request.of(tensors[0])
    if request.newest and _is_newest(left) and len(left.shape) == len(request.shape) > 1:
        found = reduced(left, (len(left.shape) - 1,), request.shape, keepdim=True)
        return [found]
    right = request.of(tensors[1])
    if name == "addbmm" or (len(left.shape) > 3 and name == "_grouped_mm"):
        return unknown(request)
    shape = request.shape
    if name == "linear":
        right = changed(right, right.shape[::-1], lambda values: values.transpose())
    if name == "_grouped_mm":
        if len(left.shape) != 2 or len(right.shape) != 3 or not right.blank:
            return unknown(request)
        right = blank(right.shape[1:])  # each row meets one of the matrices
    if len(left.shape) == 1:
        left = changed(left, (1, *left.shape), lambda values: values[None])
        shape = (*shape[:-1], 1, *shape[-1:]) if len(right.shape) > 1 else (1, *shape)
    if len(right.shape) == 1:
        right = changed(right, (*right.shape, 1), lambda values: values[:, None])
        shape = (*shape, 1)
    found = product(left, right, shape)
    if shape != request.shape:
        found = view(found, request.shape, contiguous(request.shape), 0)
    return [found if added is None or added.blank else merged((found, added), request.shape)]


@rule("embedding")
def embedding(request: Request) -> Sequence[Labels]:
    ids = request.labels("indices")
    assert ids is not None
    return [changed(ids, request.shape, lambda values: values[..., None])]


# Along dimensions


def _dims(request: Request, own: Labels, name: str = "dim") -> list[int]:
    """The dimensions of an argument that is a number, a list, or None for all."""
    dim = request.given.get(name, request.given.get("axis"))
    ndim = len(own.shape)
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(ndim))
    return [d % max(ndim, 1) for d in (dim if isinstance(dim, list | tuple) else [dim])] if ndim else []


@rule(
    "sum mean amax amin prod var std norm logsumexp any all argmax argmin max min median nanmedian var_mean std_mean "
    "nansum nanmean count_nonzero aminmax mode linalg_norm linalg_vector_norm quantile"
)
def reduction(request: Request) -> Sequence[Labels | None]:
    own = request.own
    if len(request.tensors) > 1:  # the larger of two tensors
        return pointwise(request)
    dims = _dims(request, own)
    return [reduced(own, dims, shape, keepdim=len(shape) == len(own.shape)) for shape in request.shapes]


@rule("softmax log_softmax softmin")
def softmax(request: Request) -> Sequence[Labels]:
    own = request.own
    if own.position is not None and not own.position.dims and own.key is None:
        return [own]
    dims = _dims(request, own)
    found = mixed_along(own, dims, request.shape)
    hidden = OPEN
    if own.key is not None and dims == list(own.key.dims) and own.hidden != OPEN:
        hidden = ZERO if request.kind.name == "softmax" else own.hidden
    return [
        labels(
            found.shape,
            found.row,
            found.position,
            found.key,
            slot=found.slot,
            key_slot=found.key_slot,
            bounds=dict(found.bounds),
            checks=found.checks,
            hidden=hidden,
        )
    ]


@rule("native_layer_norm layer_norm _fused_rms_norm rms_norm")
def layer_norm(request: Request) -> Sequence[Labels]:
    """Of the result, and of means and deviations if they come with it."""
    own = request.own
    count = len(request.given.get("normalized_shape", (0,)))
    dims = range(len(own.shape) - count, len(own.shape))
    of_each = [reduced(own, dims, shape, keepdim=True) for shape in request.shapes[1:]]
    return [mixed_along(own, dims, own.shape), *of_each]


@rule("native_group_norm group_norm")
def group_norm(request: Request) -> Sequence[Labels | None]:
    own = request.own
    found = mixed_along(own, range(1, len(own.shape)), own.shape)
    return [found, *(None for _ in request.shapes[1:])]


@rule("native_batch_norm _native_batch_norm_legit cudnn_batch_norm miopen_batch_norm _batch_norm_with_update")
def batch_norm(request: Request) -> Sequence[Labels | None]:
    own = request.own
    training = bool(request.given.get("training", True))
    dims = [d for d in range(len(own.shape)) if d != 1] if training else []
    return [mixed_along(own, dims, own.shape), *(None for _ in request.shapes[1:])]


@rule("cumsum cumprod logcumsumexp cummax cummin")
def cumulative(request: Request) -> Sequence[Labels]:
    """Each element depends on those before it: of earlier positions, unless somebody turned them round."""
    own = request.own
    dims = _dims(request, own)
    ascending = own.position is None or bool((np.diff(own.position.values, axis=dims[0]) >= 0).all()) if dims else True
    found = own if ascending and own.key is None else mixed_along(own, dims, own.shape)
    return [_opened(found) for _ in request.shapes]


def _opened(found: Labels) -> Labels:
    """Without a claim about later keys."""
    if found.hidden == OPEN:
        return found
    return mixed_along(changed(found, found.shape, lambda values: values, hidden=OPEN), (), found.shape)


@rule("glu")
def glu(request: Request) -> Sequence[Labels]:
    own = request.own
    dim = _dims(request, own)[0] if "dim" in request.given else len(own.shape) - 1

    def halve(values: Array) -> NDArray[np.int32] | None:
        if values.shape[dim] == 1:
            return values
        first, second = np.split(values, 2, dim)
        return first if np.array_equal(first, second) else None

    return [changed(own, request.shape, halve)]


@rule("scaled_dot_product_attention")
def fused_attention(request: Request) -> Sequence[Labels | None]:
    """What a query sees of keys and values: as probabilities times values."""
    query, key, value = (request.labels(name) for name in ("query", "key", "value"))
    assert query is not None
    assert key is not None
    assert value is not None
    rest: list[Labels | None] = [None for _ in request.shapes[1:]]
    if not len(query.shape) == len(key.shape) == len(value.shape):
        return [*unknown(request)[:1], *rest]
    found = reduced(query, (len(query.shape) - 1,), request.shape, keepdim=True)
    bounds = dict(found.bounds)
    more, checks = beyond((key, value))
    for slot, last in more.items():
        bounds[slot] = max(bounds.get(slot, NONE), last)
    for part in (key, value):
        if part.position is not None and not (part.slot == query.slot and request.hidden != OPEN):
            bounds[part.slot] = max(bounds.get(part.slot, NONE), part.position.high)
    attended = labels(
        request.shape,
        found.row,
        found.position,
        slot=found.slot,
        bounds=bounds,
        checks=found.checks | checks | request.checks,
    )
    last = len(request.shape) - 1
    rest = [
        reduced(attended, (last,), s, keepdim=False) if s == request.shape[:-1] else None for s in request.shapes[1:]
    ]
    return [attended, *rest]


def scores_of(query: Labels, key: Labels) -> Labels:
    """The labels of the scores that a fused kernel makes of queries and keys."""
    shape = (*query.shape[:-1], key.shape[-2])
    lead = key.shape[:-2]
    over = changed(key, (*lead, key.shape[-1], key.shape[-2]), lambda values: np.swapaxes(values, -1, -2))
    if lead != query.shape[:-2] and over.row is not None:  # queries of several heads share a key
        over = changed(over, over.shape, lambda values: values if all(n == 1 for n in values.shape[:-2]) else None)
    return product(query, over, shape)


@rule("zeros_like ones_like full_like empty_like rand_like randn_like randint_like")
def like(request: Request) -> Sequence[Labels]:
    """A constant, whose elements stand for the same places."""
    own = request.own
    return [labels(own.shape, own.row, own.position, own.key, slot=own.slot, key_slot=own.key_slot)]


@rule("new_zeros new_ones new_full new_empty new_empty_strided empty_strided normal uniform exponential random zero")
def fresh(request: Request) -> Sequence[Labels]:
    return [blank(shape) for shape in request.shapes]
