"""Moves that shapes and arguments tell: turning, repeating, padding, and putting one behind the other."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stabilitykit.recorder.places.labels import (
    NONE,
    OPEN,
    Array,
    Label,
    Labels,
    beyond,
    blank,
    changed,
    fits,
    label,
    labels,
    vector,
    widen,
)
from stabilitykit.recorder.places.rules import Request, rule, unknown


@rule("flip")
def flip(request: Request) -> Sequence[Labels]:
    dims = tuple(d % len(request.shape) for d in request.given["dims"])
    return [changed(request.own, request.shape, lambda values: np.flip(values, dims))]


@rule("roll")
def roll(request: Request) -> Sequence[Labels]:
    own, given = request.own, request.given
    dims = [d % max(1, len(own.shape)) for d in given.get("dims", ())]
    shifts = given["shifts"]
    if not dims:
        return unknown(request)
    turned = {d: int(shift) for d, shift in zip(dims, shifts, strict=True)}
    return [
        changed(
            own,
            own.shape,
            lambda values: np.roll(values, [s if values.shape[d] > 1 else 0 for d, s in turned.items()], list(turned)),
        )
    ]


@rule("repeat")
def repeat(request: Request) -> Sequence[Labels]:
    own, times = request.own, list(request.given["repeats"])

    def tile(values: Array) -> NDArray[np.int32] | None:
        values = values.reshape((1,) * (len(times) - values.ndim) + values.shape)
        counts = [count if size > 1 else 1 for count, size in zip(times, values.shape, strict=True)]
        if not fits([n * m for n, m in zip(values.shape, counts, strict=True)]):
            return None
        return np.tile(values, counts)

    return [changed(own, request.shape, tile)]


@rule("cat concat concatenate stack hstack vstack")
def cat(request: Request) -> Sequence[Labels]:
    parts = [request.of(tensor) for tensor in request.tensors if tensor.shape != (0,)]
    dim = int(request.given.get("dim", 0)) % max(1, len(request.shape))
    if request.kind.name == "stack":
        parts = [
            changed(p, (*p.shape[:dim], 1, *p.shape[dim:]), lambda values: np.expand_dims(values, dim)) for p in parts
        ]
    elif request.kind.name not in ("cat", "concat", "concatenate") or any(
        len(p.shape) != len(request.shape) for p in parts
    ):
        return unknown(request)
    return [joined(parts, dim, request.shape)]


def joined(parts: Sequence[Labels], dim: int, shape: tuple[int, ...]) -> Labels:
    """Of parts that are put one behind the other. Of two sequences the one that entered first keeps its positions."""
    labelled = [part for part in parts if not part.blank]
    if not labelled:
        return blank(shape)
    bounds, checks = beyond(labelled)
    slot = min((part.slot for part in labelled if part.slot >= 0), default=-1)
    pairs = [part for part in labelled if part.key is not None]
    key_slot = pairs[0].key_slot if pairs else -1
    sizes = [part.shape[dim] for part in parts]
    row = _along([part.row for part in parts], sizes, dim, len(shape))[0]
    position = _joined_of(parts, "position", slot, bounds, sizes, dim, len(shape))
    key = _joined_of(parts, "key", key_slot, bounds, sizes, dim, len(shape)) if pairs else None
    open_ = any(part.hidden == OPEN and part.has_later() for part in pairs)
    hidden = {part.hidden for part in pairs if part.hidden != OPEN}
    return labels(
        shape,
        row,
        position,
        key,
        slot=slot,
        key_slot=key_slot,
        bounds=bounds,
        checks=checks,
        hidden=hidden.pop() if len(hidden) == 1 and not open_ else OPEN,
    )


def _joined_of(
    parts: Sequence[Labels], name: str, slot: int, bounds: dict[int, int], sizes: Sequence[int], dim: int, ndim: int
) -> Label | None:
    own: list[Label | None] = []
    for part in parts:
        one, number = (part.position, part.slot) if name == "position" else (part.key, part.key_slot)
        if one is not None and number != slot:
            widen(bounds, {number: one.high})
            one = None
        own.append(one)
    found, lost = _along(own, sizes, dim, ndim)
    if lost:
        widen(bounds, {slot: max(one.high for one in own if one is not None)})
    return found


def _along(own: Sequence[Label | None], sizes: Sequence[int], dim: int, ndim: int) -> tuple[Label | None, bool]:
    """One behind the other, NONE where nothing is known; and whether the result was too large."""
    known = [one for one in own if one is not None]
    if not known:
        return None, False
    first = known[0]
    if all(one.same(first) and dim not in one.dims for one in known):
        return first, False  # what else is put beside it counts as its neighbours' own
    if all(not one.dims or one.dims == (dim,) for one in known):
        numbers = [
            np.full(size, NONE, np.int32) if one is None else np.broadcast_to(one.values.reshape(-1), size)
            for one, size in zip(own, sizes, strict=True)
        ]
        return vector(np.concatenate(numbers), dim, ndim), False
    others = np.broadcast_shapes(*((*one.values.shape[:dim], 1, *one.values.shape[dim + 1 :]) for one in known))
    whole = [*others]
    whole[dim] = sum(sizes)
    if not fits(whole):
        return None, True
    parts = []
    for one, size in zip(own, sizes, strict=True):
        room = [*others]
        room[dim] = size
        parts.append(np.broadcast_to(np.full((1,) * ndim, NONE, np.int32) if one is None else one.values, room))
    return label(np.concatenate(parts, dim)), False


@rule("constant_pad_nd pad")
def pad(request: Request) -> Sequence[Labels]:
    own, amounts = request.own, list(request.given["pad"])
    if request.given.get("mode", "constant") != "constant":
        return unknown(request)
    ndim = len(own.shape)
    widths = [(0, 0)] * ndim
    for i in range(len(amounts) // 2):
        widths[ndim - 1 - i] = (amounts[2 * i], amounts[2 * i + 1])

    def put(values: Array) -> NDArray[np.int32] | None:
        for d, (before, after) in enumerate(widths):
            if values.shape[d] == 1 and own.shape[d] > 1:
                continue  # what is put beside it counts as its neighbours' own
            values = np.pad(
                values,
                [(max(0, before), max(0, after)) if e == d else (0, 0) for e in range(ndim)],
                constant_values=NONE,
            )
            values = values[
                tuple(
                    slice(-before if e == d and before < 0 else 0, after if e == d and after < 0 else None)
                    for e in range(ndim)
                )
            ]
        return values

    return [changed(own, request.shape, put)]


@rule("unsafe_split unsafe_split_with_sizes split_copy split_with_sizes_copy unbind_copy unsafe_chunk")
def split(request: Request) -> Sequence[Labels]:
    own, given = request.own, request.given
    dim = int(given.get("dim", 0)) % len(own.shape)
    found, start = [], 0
    for shape in request.shapes:
        size = shape[dim] if len(shape) == len(own.shape) else 1
        part = slice(start, start + size)

        def take(values: Array, part: slice = part, shape: tuple[int, ...] = shape) -> NDArray[np.int32]:
            values = values if values.shape[dim] == 1 else values[(slice(None),) * dim + (part,)]
            return values if len(shape) == values.ndim else values.squeeze(dim)

        found.append(changed(own, shape, take))
        start += size
    return found
