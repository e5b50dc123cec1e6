"""Moves by the values of an index: which row an expert was given, which slot of a cache was written.

What an index on another device holds is not waited for: the result then belongs nowhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.recorder.places.labels import (
    LARGEST,
    NONE,
    Array,
    Label,
    Labels,
    aligned,
    beyond,
    blank,
    changed,
    label,
    labels,
    spread,
)
from stabilitykit.recorder.places.merge import merged
from stabilitykit.recorder.places.rules import RULES, Request, pointwise, rule, unknown

Index = NDArray[np.int64]

BY_VALUE = frozenset(
    "index _unsafe_index index_select gather take_along_dim index_put _index_put_impl _unsafe_index_put index_add "
    "index_copy index_reduce scatter scatter_add scatter_reduce masked_select repeat_interleave sort topk argsort "
    "msort kthvalue take index_fill nonzero unique _unique2 unique_dim unique_consecutive bincount".split()
)
"""Operators whose labels depend on values, so that one call says nothing of the next."""


def _numbers(tensor: Tensor) -> Index | None:
    """What an index holds, where it can be looked at at once."""
    if tensor.device.type != "cpu" or tensor.numel() > LARGEST:
        return None
    found: Index = tensor.detach().numpy().astype(np.int64, copy=False)
    return found


def _numbered(indices: Sequence[Tensor | None]) -> list[Index | None] | None:
    """By dimension what it is indexed with, boolean masks as the places that they choose; None if not known."""
    found: list[Index | None] = []
    for index in indices:
        if index is None:
            found.append(None)
            continue
        numbers = _numbers(index)
        if numbers is None:
            return None
        if str(index.dtype) in ("torch.bool", "torch.uint8"):
            found += list(numbers.nonzero())
        else:
            found.append(numbers)
    return found


def _chosen(values: Array, indices: Sequence[Index | None]) -> NDArray[np.int32]:
    """`values[indices]` of an array that broadcasts to what is indexed."""
    places: list[Any] = []
    for dim, index in enumerate(indices):
        if index is None:
            places.append(slice(None))
        else:
            places.append(index if values.shape[dim] > 1 else np.zeros((1,) * index.ndim, np.int64))
    found = values[tuple(places)]
    return np.asarray(found)


def _spot(indices: Sequence[Index | None]) -> int:
    """The dimension of the result at which those of the indices stand: in front, where other dimensions part them."""
    given = [dim for dim, index in enumerate(indices) if index is not None]
    together = given == list(range(given[0], given[-1] + 1))
    return given[0] if together else 0


@rule("index _unsafe_index")
def index(request: Request) -> Sequence[Labels]:
    own, given = request.own, request.given["indices"]
    return [_indexed(request, own, given, request.shape)]


@rule("index_select")
def index_select(request: Request) -> Sequence[Labels]:
    own, dim = request.own, request.given["dim"]
    dim = dim % max(1, len(own.shape))
    return [_indexed(request, own, [*[None] * dim, request.given["index"]], request.shape)]


def _indexed(request: Request, own: Labels, given: Sequence[Tensor | None], shape: tuple[int, ...]) -> Labels:
    """What was chosen has its own labels, by the values of the index; of weights the index's."""
    tensors = [one for one in given if one is not None]
    masks = any(str(one.dtype) in ("torch.bool", "torch.uint8") for one in tensors)
    of_index = [request.of(one) for one in tensors]
    if own.blank and all(one.blank for one in of_index):
        return blank(shape)
    found = blank(shape)
    indices: list[Index | None] | None = None
    if not own.blank:
        indices = _numbered(given)
        if indices is None:
            return spread([own, *of_index], shape)
        indices += [None] * (len(own.shape) - len(indices))
        known = indices
        found = changed(own, shape, lambda values: _fitted(_chosen(values, known), shape))
    if found.position is not None or masks:
        return found
    spots = list(given)
    at = next(i for i, one in enumerate(spots) if one is not None)
    last = max(i for i, one in enumerate(spots) if one is not None)
    if any(one is None for one in spots[at : last + 1]):
        at = 0
    behind = len(shape) - at - max(one.ndim for one in tensors)
    raised = [
        changed(one, (*one.shape, *[1] * behind), lambda values: values.reshape((*values.shape, *[1] * behind)))
        for one in of_index
    ]
    joint = merged(raised, shape)
    return _first_known(found, joint, shape)


def _fitted(values: NDArray[np.int32], shape: tuple[int, ...]) -> NDArray[np.int32] | None:
    return values if values.ndim == len(shape) and values.size <= LARGEST else None


def _first_known(one: Labels, other: Labels, shape: tuple[int, ...]) -> Labels:
    """The labels of `one`, and where it has none those of `other`."""
    bounds, checks = beyond((one, other))
    of = one if one.position is not None else other
    return labels(
        shape,
        other.row if one.row is None else one.row,
        of.position,
        of.key,
        slot=of.slot,
        key_slot=of.key_slot,
        bounds=bounds,
        checks=checks,
    )


@rule("gather take_along_dim")
def gather(request: Request) -> Sequence[Labels]:
    own, of_index = request.own, request.labels("index") or request.labels("indices")
    assert of_index is not None
    if own.blank and of_index.blank:
        return [blank(request.shape)]
    tensor = request.given.get("index", request.given.get("indices"))
    dim = request.given.get("dim")
    numbers = _numbers(tensor)
    if dim is None or not request.shape:
        return unknown(request)
    dim = dim % len(own.shape)

    def take(values: Array) -> NDArray[np.int32] | None:
        values = values[tuple(slice(0, n) if d != dim else slice(None) for d, n in enumerate(request.shape))]
        if values.shape[dim] == 1:
            return values
        if numbers is None or numbers.size > LARGEST:
            return None
        room = [values.shape[d] if d == dim else n for d, n in enumerate(numbers.shape)]
        return np.take_along_axis(np.broadcast_to(values, room), numbers, dim)

    found = changed(own, request.shape, take)
    return [found if found.position is not None else _first_known(found, of_index, request.shape)]


@rule("sort topk argsort msort kthvalue")
def ordered(request: Request) -> Sequence[Labels]:
    """By the indices that come with the values, where there are some."""
    own = request.own
    dim = int(request.given.get("dim", -1)) % max(1, len(own.shape))

    def dropped(values: Array) -> NDArray[np.int32] | None:
        if values.ndim == 0 or values.shape[dim] == 1:
            return values if values.ndim == len(request.shape) else values.squeeze(dim)
        return None

    return [changed(own, shape, dropped) for shape in request.shapes]


def by_indices(own: Labels, dim: int, indices: Tensor) -> Labels | None:
    """The labels of what a sort has put in this order."""
    numbers = _numbers(indices)
    if numbers is None or numbers.ndim != len(own.shape):
        return None

    def take(values: Array) -> NDArray[np.int32] | None:
        if values.shape[dim] == 1:
            return values
        room = [values.shape[d] if d == dim else n for d, n in enumerate(numbers.shape)]
        return np.take_along_axis(np.broadcast_to(values, room), numbers, dim)

    return changed(own, numbers.shape, take)


@rule("masked_select")
def masked_select(request: Request) -> Sequence[Labels]:
    own, mask = request.own, _numbers(request.tensors[1])
    if mask is None or own.blank:
        return unknown(request)
    whole = np.broadcast_shapes(own.shape, mask.shape)
    chosen = np.broadcast_to(mask, whole).nonzero()

    def take(values: Array) -> NDArray[np.int32]:
        values = aligned(values, len(whole))
        return values[tuple(c if n > 1 else np.zeros_like(c) for c, n in zip(chosen, values.shape, strict=True))]

    return [changed(own, request.shape, take)]


@rule("repeat_interleave")
def repeat_interleave(request: Request) -> Sequence[Labels]:
    own, given = request.own, request.given
    repeats, dim = given["repeats"], given.get("dim")
    if own.blank:
        return [blank(request.shape)]
    if "self" not in given or dim is None:
        return unknown(request)
    times: Any = repeats
    if isinstance(repeats, Tensor):
        times = _numbers(repeats)
        if times is None:
            return unknown(request)
    dim = dim % len(own.shape)

    def again(values: Array) -> NDArray[np.int32]:
        return values if values.shape[dim] == 1 else np.repeat(values, times, dim)

    return [changed(own, request.shape, again)]


# Writes


@rule("index_put _index_put_impl _unsafe_index_put")
def index_put(request: Request) -> Sequence[Labels]:
    given = request.given
    values = request.labels("values")
    assert values is not None
    adds = bool(given.get("accumulate", False))
    return [_put(request, request.own, _numbered(given["indices"]), values, adds=adds)]


@rule("index_copy index_add index_reduce index_fill")
def index_copy(request: Request) -> Sequence[Labels]:
    given, own = request.given, request.own
    dim = given["dim"] % max(1, len(own.shape))
    source = request.labels("source")
    if source is None:
        return [own]
    numbers = _numbered([given["index"]])
    indices = None if numbers is None else [*[None] * dim, *(n.reshape(-1) for n in numbers if n is not None)]
    return [_put(request, own, indices, source, adds=request.kind.name != "index_copy")]


def _put(request: Request, own: Labels, indices: list[Index | None] | None, new: Labels, *, adds: bool) -> Labels:
    """`own` with `new` at these places."""
    if new.blank:
        return own
    if indices is None:
        return spread([own, new], own.shape)
    indices = [*indices, *[None] * (len(own.shape) - len(indices))]
    bounds, checks = beyond((own, new))
    slot, theirs = own.slot, new.position
    if slot >= 0 and new.slot >= 0 and slot != new.slot:
        bounds[new.slot] = max(bounds.get(new.slot, NONE), new.position.high if new.position else NONE)
        theirs = None
    elif slot < 0:
        slot = new.slot
    made: list[Label | None] = []
    for one, other, number in ((own.row, new.row, -1), (own.position, theirs, slot)):
        if other is None and (number >= 0 or one is None or adds):
            made.append(one)
            continue
        found = _placed(one, other, own.shape, indices, adds=adds)
        if found is None and number >= 0:
            for part in (one, other):
                if part is not None:
                    bounds[number] = max(bounds.get(number, NONE), part.high)
        made.append(found)
    return labels(own.shape, *made, slot=slot, bounds=bounds, checks=checks)


def _placed(
    one: Label | None, other: Label | None, shape: tuple[int, ...], indices: Sequence[Index | None], *, adds: bool
) -> Label | None:
    old = np.full((1,) * len(shape), NONE, np.int32) if one is None else one.values
    grid = np.broadcast_shapes(*(i.shape for i in indices if i is not None))
    spot = _spot(indices)
    rest = [dim for dim, index in enumerate(indices) if index is None]
    ndim = len(grid) + len(rest)
    new = np.full((1,) * ndim, NONE, np.int32) if other is None else aligned(other.values, ndim)
    kept = [new.shape[i] for i in range(ndim) if not spot <= i < spot + len(grid)]
    room = [n if indices[d] is not None else max(old.shape[d], kept[rest.index(d)]) for d, n in enumerate(shape)]
    if np.prod(room, dtype=np.int64) > LARGEST:
        return None
    values = np.broadcast_to(old, room).copy()
    place = tuple(slice(None) if index is None else index for index in indices)
    if not adds or one is None:
        before = values.copy() if adds else None
        values[place] = new
        if before is not None and not bool((values[place] == new).all()):  # two of them at one place
            return None
        return label(values)
    if bool(((values[place] == new) | (new == NONE)).all()):
        return one
    np.maximum.at(values, place, np.broadcast_to(new, values[place].shape))  # type: ignore[arg-type]
    return label(values)


@rule("scatter scatter_add scatter_reduce")
def scatter(request: Request) -> Sequence[Labels]:
    given, own = request.given, request.own
    dim = given["dim"] % max(1, len(own.shape))
    index, source = request.labels("index"), request.labels("src")
    assert index is not None
    if not isinstance(given.get("src"), Tensor):
        source = blank(index.shape)
    assert source is not None
    fits = all(m == n or d == dim for d, (m, n) in enumerate(zip(index.shape, own.shape, strict=True)))
    parts = [own]
    for part in (index, source):
        if part.blank:
            continue
        if not fits:
            return unknown(request)

        def cut(values: Array) -> NDArray[np.int32] | None:
            return None if values.shape[dim] > 1 else values

        parts.append(changed(part, own.shape, cut))
    return [merged(parts, own.shape)]


RULES["index_fill"] = lambda request: [request.own]
RULES["put"] = unknown
RULES["masked_scatter"] = pointwise
