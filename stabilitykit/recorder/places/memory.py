"""Memory: the labels of a view follow from those of the tensor that the memory was made for, by strides alone.

Views are not intercepted. A storage has the labels of what was written into it, as of one contiguous tensor; a view of
it is looked up by shape, strides and offset, whatever led to it: `transpose`, `select`, `unbind`, a split of heads, a
flattened batch.
"""

from math import prod

import numpy as np
from numpy.typing import NDArray

from stabilitykit.recorder.places.labels import LARGEST, NONE, Array, Label, Labels, blank, changed, label, labels

Strides = tuple[int, ...]

_VIEWS = 1 << 12  # of one tensor, that are remembered


def contiguous(shape: tuple[int, ...]) -> Strides:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


def in_memory(of: Labels, strides: Strides) -> Labels | None:
    """As a contiguous tensor that fills the memory of one with these strides; None where there is none.

    Gaps between elements are elements that belong nowhere; dimensions without a stride of their own are left out.
    """
    found = of.stored.get(strides)
    if found is None:
        made = of if strides == contiguous(of.shape) else _in_memory(of, strides)
        if made is None:
            return None
        found = of.stored[strides] = made
    return found


def _in_memory(of: Labels, strides: Strides) -> Labels | None:
    dims = sorted((d for d, size in enumerate(of.shape) if size > 1 and strides[d]), key=lambda d: -strides[d])
    shape = tuple(of.shape[d] for d in dims)
    extents = []  # of the memory along each dimension, gaps included
    for i, d in enumerate(dims):
        above = strides[dims[i - 1]] if i else strides[d] * of.shape[d]
        if above % strides[d] or above < strides[d] * of.shape[d]:
            return None
        extents.append(above // strides[d])
    if dims and strides[dims[-1]] != 1:
        extents.append(strides[dims[-1]])
    full = tuple(extents)

    def move(values: Array) -> NDArray[np.int32] | None:
        if any(values.shape[d] > 1 for d in range(values.ndim) if d not in dims):
            return None
        values = values.transpose(*dims, *(d for d in range(values.ndim) if d not in dims)).reshape(
            [values.shape[d] for d in dims]
        )
        if full != shape:
            values = values.reshape((*values.shape, *[1] * (len(full) - len(shape))))
            room = [n if values.shape[i] > 1 else 1 for i, n in enumerate(full)]
            if prod(room) > LARGEST:
                return None
            gaps = np.full(room, NONE, np.int32)
            gaps[tuple(slice(0, n) for n in values.shape)] = values
            return gaps
        return values

    return changed(of, full, move)


def refined(base: Labels, parts: int) -> Labels:
    """As memory of elements of which `parts` make up one of the base's: a real view of complex numbers."""
    shape = (*base.shape, parts)
    return changed(base, shape, lambda values: values[..., None])


def view(base: Labels, shape: tuple[int, ...], strides: Strides, offset: int) -> Labels:
    """The labels of a view of the memory that `base` fills."""
    key = shape, strides, offset
    found = base.views.get(key)
    if found is None:
        if shape == base.shape and not offset and strides == contiguous(shape):
            found = base
        elif base.blank or 0 in shape:
            found = blank(shape)
        else:
            found = changed(base, shape, lambda values: _seen(values, base.shape, shape, strides, offset))
        if len(base.views) > _VIEWS:
            base.views.clear()
        base.views[key] = found
    return found


def _seen(
    values: Array, of: tuple[int, ...], shape: tuple[int, ...], strides: Strides, offset: int
) -> NDArray[np.int32] | None:
    steps = contiguous(of)
    wide = [d for d, size in enumerate(values.shape) if size > 1]
    if len(wide) == 1:
        d = wide[0]
        moving = _moving(steps[d], steps[d] * of[d], shape, strides, offset)
        if not moving:
            return np.reshape(values.reshape(-1)[offset // steps[d] % of[d]], (1,) * len(shape))
        if len(moving) == 1 and not strides[moving[0]] % steps[d]:
            m = moving[0]
            first, pace = offset // steps[d] % of[d], strides[m] // steps[d]
            if first + (shape[m] - 1) * pace < of[d]:
                numbers = values.reshape(-1)[first : first + (shape[m] - 1) * pace + 1 : pace]
                return np.reshape(numbers, [-1 if other == m else 1 for other in range(len(shape))])
    places: list[NDArray[np.int64] | int] = []
    total = 1
    for d, size in enumerate(values.shape):
        if size == 1:
            places.append(0)
            continue
        moving = _moving(steps[d], steps[d] * of[d], shape, strides, offset)
        places.append((_offsets(shape, strides, offset, moving) // steps[d]) % of[d])
        total = max(total, prod(shape[m] for m in moving))
        if total > LARGEST:
            return None
    if not shape:
        return np.asarray(values[tuple(int(p) for p in places)])
    if all(isinstance(place, int) for place in places):
        return values.reshape((1,) * len(shape))
    if prod(np.broadcast_shapes(*(p.shape for p in places if not isinstance(p, int)))) > LARGEST:
        return None
    return np.asarray(values[tuple(places)])


def _moving(step: int, extent: int, shape: tuple[int, ...], strides: Strides, offset: int) -> list[int]:
    """The dimensions of a view along which the coordinate `offset // step % extent` may change."""
    moving = sorted((d for d, size in enumerate(shape) if size > 1 and strides[d] % extent), key=lambda d: strides[d])
    reach = fixed = 0
    for i, d in enumerate(moving):
        if strides[d] >= step:
            break
        reach += (shape[d] - 1) * strides[d]
        block = strides[moving[i + 1]] if i + 1 < len(moving) else step
        within = offset % min(block, step) + reach < min(block, step)
        if within and not any(n % min(block, step) for n in (step, *(strides[m] for m in moving[i + 1 :]))):
            fixed = i + 1  # together too short a way to leave the place
    return moving[fixed:]


def _offsets(shape: tuple[int, ...], strides: Strides, offset: int, moving: list[int]) -> NDArray[np.int64]:
    """Of the elements of a view along these dimensions, the others at their first place."""
    found = np.full((1,) * len(shape), offset, np.int64)
    for d in moving:
        along = np.arange(shape[d], dtype=np.int64) * strides[d]
        found = found + along.reshape([-1 if other == d else 1 for other in range(len(shape))])
    return found


def written(base: Labels, new: Labels, strides: Strides, offset: int) -> Labels:
    """The labels of memory into a view of which something is written that has the labels `new`."""
    shape = new.shape
    if 0 in shape:
        return base
    if prod(shape) == prod(base.shape) and offset == 0:
        whole = in_memory(new, strides)
        if whole is not None and prod(whole.shape) == prod(base.shape):
            return _as_shape(whole, base.shape)
    bounds = dict(base.bounds)
    for slot, last in new.bounds:
        bounds[slot] = max(bounds.get(slot, last), last)
    slot, key_slot = base.slot, base.key_slot
    position, other = base.position, new.position
    if base.slot >= 0 and new.slot >= 0 and base.slot != new.slot:
        other = None  # two sequences in one memory: the first keeps its name
        bounds[new.slot] = max(bounds.get(new.slot, NONE), new.position.high if new.position else NONE)
    elif base.slot < 0:
        slot = new.slot
    lost = False
    made: list[Label | None] = []
    for old, more in ((base.row, new.row), (position, other), (base.key, new.key)):
        values = _put(old, more, base.shape, shape, strides, offset)
        lost = lost or values is None
        made.append(None if values is None else label(values))
    if lost:
        for upto in (base.upto(), new.upto()):
            for number, last in upto.items():
                bounds[number] = max(bounds.get(number, last), last)
    if base.key is None and new.key is not None:
        key_slot = new.key_slot
    return labels(
        base.shape,
        *made,
        slot=slot,
        key_slot=key_slot,
        bounds=bounds,
        checks=base.checks | new.checks,
        hidden=new.hidden if base.key is None or base.hidden == new.hidden else 0,
    )


def _as_shape(whole: Labels, shape: tuple[int, ...]) -> Labels:
    return whole if whole.shape == shape else view(whole, shape, contiguous(shape), 0)


def _put(
    old: Label | None, new: Label | None, of: tuple[int, ...], shape: tuple[int, ...], strides: Strides, offset: int
) -> NDArray[np.int32] | None:
    """The array `old` of memory of shape `of`, with `new` where the view is; None where it would be too large."""
    nothing = np.full((1,) * len(of), NONE, np.int32)
    if old is None and new is None:
        return nothing
    steps = contiguous(of)
    moving = [_moving(steps[d], steps[d] * of[d], shape, strides, offset) for d in range(len(of))]
    if any(prod(shape[m] for m in dims) > LARGEST for dims in moving):
        return None
    there = [_offsets(shape, strides, offset, dims) // steps[d] % of[d] for d, dims in enumerate(moving)]
    varies = set() if new is None else set(new.dims)
    wanted = [
        d
        for d, size in enumerate(of)
        if size > 1
        and ((old is not None and d in old.dims) or varies & set(moving[d]) or np.unique(there[d]).size != size)
    ]
    rest = prod(of[d] for d in range(len(of)) if d not in wanted)
    if _combined([there[d] for d in wanted], [of[d] for d in wanted]) * rest != prod(shape):
        wanted = [d for d, size in enumerate(of) if size > 1]  # some of the rest are left out now here, now there
    room = [of[d] if d in wanted else 1 for d in range(len(of))]
    if prod(room) > LARGEST or varies - {m for d in wanted for m in moving[d]}:
        return None
    values = np.broadcast_to(nothing if old is None else old.values, room).copy()
    value: NDArray[np.int32] | int = NONE if new is None else new.values
    if not wanted:
        return np.asarray(value, np.int32).reshape((1,) * len(of))
    place = [there[d] if d in wanted else np.zeros((1,) * len(shape), np.int64) for d in range(len(of))]
    if prod(np.broadcast_shapes(*(p.shape for p in place))) > LARGEST:
        return None
    values[tuple(place)] = value
    return values


def _combined(places: list[NDArray[np.int64]], sizes: list[int]) -> int:
    """How many combinations of coordinates there are; 0 where they are too many to count."""
    if not places:
        return 1
    if prod(np.broadcast_shapes(*(place.shape for place in places))) > LARGEST:
        return 0
    codes: NDArray[np.int64] = np.zeros((), np.int64)
    for place, size in zip(places, sizes, strict=True):
        codes = codes * size + place
    return int(np.unique(codes).size)
