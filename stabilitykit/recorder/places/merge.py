"""What an element belongs to that was made of several: the later of two positions, and both of a query and a key."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stabilitykit.recorder.places.labels import (
    NONE,
    OPEN,
    Array,
    Label,
    Labels,
    aligned,
    beyond,
    blank,
    fits,
    label,
    labels,
    widen,
)


def merged(parts: Sequence[Labels], shape: tuple[int, ...]) -> Labels:
    """Of a tensor of this shape, to which the parts were broadcast. What hides the later keys is not looked at."""
    parts = [part for part in parts if not part.blank]
    if not parts:
        return blank(shape)
    if len(parts) == 1 and parts[0].shape == shape and parts[0].hidden == OPEN:
        return parts[0]
    ndim = len(shape)
    bounds, checks = beyond(parts)
    rows = [part.row for part in parts]
    row: Label | None = None
    for other in rows:
        if other is not None:
            row = raised(other, ndim) if row is None else both_rows(row, raised(other, ndim))
    first = next((part for part in parts if part.key is not None), None)
    ordered = parts if first is None else [first, *(part for part in parts if part is not first)]
    joint = _Joint(bounds)
    for part in ordered:
        joint.add(part, ndim)
    return labels(
        shape,
        row,
        joint.position,
        joint.key,
        slot=joint.slot,
        key_slot=joint.key_slot,
        bounds=bounds,
        checks=checks,
        raw=all(part.raw for part in parts),
    )


def raised(of: Label, ndim: int) -> Label:
    """With as many dimensions as the tensor that it is broadcast to."""
    have = of.values.ndim
    if have == ndim:
        return of
    if len(of.dims) < 2:
        return of.along(of.dims[0] + ndim - have if of.dims else 0, ndim)
    found = label(aligned(of.values, ndim))
    assert found is not None
    return found


def both_rows(one: Label, other: Label) -> Label | None:
    """Where both are known they have to agree."""
    if one.same(other):
        return one
    if not fits(one.values.shape, other.values.shape):
        return None
    a, b = np.broadcast_arrays(one.values, other.values)
    return label(np.where(a == b, a, np.where(b == NONE, a, np.where(a == NONE, b, NONE))))


def later_of(one: Label, other: Label) -> Label | None:
    """Element by element the later position; NONE is earlier than all. None where that array is too large."""
    if one.same(other):
        return one
    for a, b in ((one, other), (other, one)):
        if not a.dims and a.low >= b.high:
            return a  # the newest of all
    if not fits(one.values.shape, other.values.shape):
        return None
    return label(np.maximum(one.values, other.values))


class _Joint:
    """The positions of what is merged, part by part; `bounds` grow by what they leave out."""

    def __init__(self, bounds: dict[int, int]) -> None:
        self.position: Label | None = None
        self.key: Label | None = None
        self.slot = self.key_slot = -1
        self.bounds = bounds

    def add(self, part: Labels, ndim: int) -> None:
        for one, slot in ((part.position, part.slot), (part.key, part.key_slot)):
            if one is not None:
                self._take(raised(one, ndim), slot)

    def _take(self, one: Label, slot: int) -> None:
        if self.position is None:
            self.position, self.slot = one, slot
        elif (one.same(self.position) and slot == self.slot) or (
            self.key is not None and one.same(self.key) and slot == self.key_slot
        ):
            return
        elif self.key is None and one.dims and self.position.dims and not set(one.dims) & set(self.position.dims):
            if one.dims < self.position.dims:  # the query is the earlier dimension
                self.key, self.key_slot = self.position, self.slot
                self.position, self.slot = one, slot
            else:
                self.key, self.key_slot = one, slot
        elif slot == self.slot and (later := later_of(self.position, one)) is not None:
            self.position = later
        else:
            widen(self.bounds, {slot: one.high})


def product(left: Labels, right: Labels, shape: tuple[int, ...]) -> Labels:
    """Of `[..., M, K] @ [..., K, N]`, of shape `[..., M, N]`."""
    if left.blank and right.blank:
        return blank(shape)
    bounds, checks = beyond((left, right))
    kept: list[tuple[Label, int]] = []
    row: Label | None = None
    parts = (_Operand(left, -1, len(shape)), _Operand(right, -2, len(shape)))
    for mine, other in (parts, parts[::-1]):
        found = mine.kept(mine.of.row)
        if found is not None:
            row = found if row is None else both_rows(row, found)
        for part, slot in mine.positions:
            found = mine.kept(part)
            if found is not None:
                kept.append((found, slot))
            elif not mine.weighs(part, slot, other):
                widen(bounds, {slot: part.high})
    joint = _Joint(bounds)
    for part, slot in kept:
        joint._take(part, slot)
    return labels(
        shape, row, joint.position, joint.key, slot=joint.slot, key_slot=joint.key_slot, bounds=bounds, checks=checks
    )


class _Operand:
    """One side of a product, which sums over its dimension `over`."""

    def __init__(self, of: Labels, over: int, ndim: int) -> None:
        self.of, self.over, self.ndim = of, over, ndim
        pairs = ((of.position, of.slot), (of.key, of.key_slot))
        self.positions = [(part, slot) for part, slot in pairs if part is not None]

    def summed(self, part: Label) -> bool:
        return part.values.ndim > 0 and part.values.shape[self.over] > 1

    def kept(self, part: Label | None) -> Label | None:
        return None if part is None or self.summed(part) else raised(part, self.ndim)

    def along(self, part: Label) -> Array | None:
        """The numbers along the dimension that is summed over, if they change along no other."""
        if not part.dims or part.dims == (part.values.ndim + self.over,):
            return part.values.reshape(-1)
        return None

    def weighs(self, part: Label, slot: int, other: "_Operand") -> bool:
        """Whether what is summed over at these positions takes part in no result of an earlier one.

        That holds where one side are probabilities, no key of which is later than its query, or has any weight, and the
        other are values at the same keys.
        """
        for weights, values in ((self, other), (other, self)):
            of = weights.of
            if of.key is None or of.slot != of.key_slot or slot != of.slot or weights.summed_pair() is None:
                continue
            keys, queries = weights.summed_pair() or (None, None)
            assert keys is not None
            if queries is not of.position or not closed(of):
                continue
            of_values = values.of.position
            if part is keys and (of_values is None or not values.summed(of_values)):
                return True  # what it weighs belongs nowhere, or to the same place throughout
            if of_values is None or values.of.slot != slot:
                continue
            mine, theirs = weights.along(keys), values.along(of_values)
            if mine is not None and theirs is not None and np.array_equal(mine, theirs):
                return True
        return False

    def summed_pair(self) -> tuple[Label, Label] | None:
        """Keys that are summed over, and the queries that are not."""
        of = self.of
        if of.key is None or of.position is None:
            return None
        if self.summed(of.key) and not self.summed(of.position):
            return of.key, of.position
        return None


def closed(of: Labels) -> bool:
    """Whether nothing of a later key than its query is in these scores or probabilities."""
    return of.hidden != OPEN or not of.has_later()


def reduced(of: Labels, dims: Sequence[int], shape: tuple[int, ...], keepdim: bool) -> Labels:
    """What is left when these dimensions are combined into one element each."""
    axes = tuple(dims)
    bounds = dict(of.bounds)
    made: list[Label | None] = []
    for part, slot in ((of.row, -1), (of.position, of.slot), (of.key, of.key_slot)):
        if part is None:
            made.append(None)
            continue
        values = part.values
        if any(values.shape[d] > 1 for d in axes):
            values, lost = agreeing(values, axes)
            harmless = part is of.key and slot == of.slot and closed(of)
            if lost and slot >= 0 and not harmless:
                widen(bounds, {slot: part.high})
        made.append(
            label(values if keepdim else values.reshape([n for d, n in enumerate(values.shape) if d not in axes]))
        )
    row, position, key = made
    return labels(
        shape, row, position, key, slot=of.slot, key_slot=of.key_slot, bounds=bounds, checks=of.checks, hidden=of.hidden
    )


def agreeing(values: Array, axes: tuple[int, ...]) -> tuple[NDArray[np.int32], bool]:
    """One number for all along these dimensions where they agree, NONE elsewhere; whether there is such a place."""
    high = values.max(axis=axes, keepdims=True)
    low = np.where(values == NONE, np.iinfo(np.int32).max, values).min(axis=axes, keepdims=True)
    agree = (low == high) | (high == NONE)
    return np.where(agree, high, NONE).astype(np.int32), not bool(agree.all())


def mixed_along(of: Labels, dims: Sequence[int], shape: tuple[int, ...]) -> Labels:
    """Of a tensor that keeps its shape, each of whose elements depends on all others along these dimensions."""
    bounds = dict(of.bounds)
    for part, slot in ((of.position, of.slot), (of.key, of.key_slot)):
        if part is not None and any(part.values.shape[d] > 1 for d in dims):
            if part is of.key and slot == of.slot and closed(of):
                continue
            widen(bounds, {slot: part.high})
    return labels(
        shape,
        of.row,
        of.position,
        of.key,
        slot=of.slot,
        key_slot=of.key_slot,
        bounds=bounds,
        checks=of.checks,
        hidden=of.hidden,
    )
