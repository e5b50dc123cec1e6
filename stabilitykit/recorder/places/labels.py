"""Labels: the batch row and the position that each element of a tensor belongs to, and what else it depends on.

A label is an array of integers that broadcasts to the tensor's shape: of size 1 along every dimension that it does not
change along. So a hidden state `[B, L, D]` has the rows `[B, 1, 1]` and the positions `[1, L, 1]`, whatever its size.
Positions count from where the present call of the model begins, so that cached ones are negative, and a step of a
generation has the same labels as the one before.

Labels and arrays are interned: what is equal is nearly always one object, and results are remembered by identity.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int32]

NONE = -(2**31)
"""In an array: not known, or of no row and no position, as a constant is."""

LARGEST = 1 << 22  # elements of an array; a label that would need more is not known
_KEPT = 1 << 13  # arrays, and labels, that are remembered

OPEN, MINUS, ZERO = range(3)
"""What attention scores hold where the key is later than the query: anything, -inf as good as, or nothing."""


@dataclass(slots=True, eq=False)
class Label:
    """`dims` are the dimensions that the array changes along; `low` and `high` its least and greatest known number.

    `placed` are the labels that hold the same numbers along another dimension or of another number of them.
    """

    values: Array
    dims: tuple[int, ...]
    low: int
    high: int
    complete: bool
    placed: dict[tuple[int, int], "Label"] = field(default_factory=dict, repr=False)

    def same(self, other: "Label | None") -> bool:
        return self is other or (
            other is not None
            and self.dims == other.dims
            and self.low == other.low
            and self.high == other.high
            and self.values.shape == other.values.shape
            and bool(np.array_equal(self.values, other.values))
        )

    def at(self, index: Sequence[int]) -> int | None:
        """At an element of the tensor."""
        found = int(self.values[tuple(i if size > 1 else 0 for i, size in zip(index, self.values.shape, strict=True))])
        return None if found == NONE else found

    def along(self, dim: int, ndim: int) -> "Label":
        """The same numbers, which change along one dimension or none, along the dimension `dim` of `ndim`."""
        found = self.placed.get((dim, ndim))
        if found is None:
            shape = [1] * ndim
            if self.dims:
                shape[dim] = -1
            dims = (dim,) if self.dims else ()
            values = self.values.reshape(shape)
            found = Label(values, dims, self.low, self.high, self.complete, self.placed)
            self.placed[(dim, ndim)] = found
        return found


_arrays: dict[tuple[tuple[int, ...], bytes], Label] = {}
_constants: dict[int, Label] = {}


def constant(value: int, ndim: int) -> Label:
    """The same number everywhere."""
    found = _constants.get(value)
    if found is None:
        found = _constants[value] = Label(np.full((), value, np.int32), (), value, value, True)
    return found.along(0, ndim)


def vector(values: NDArray[np.int32], dim: int, ndim: int) -> Label | None:
    """A label that changes along one dimension at most, of its numbers there."""
    found = _interned((values.size,), values)
    return None if found is None else found.along(dim, ndim)


def label(values: NDArray[Any]) -> Label | None:
    """The label of this array; None where nothing in it is known."""
    values = np.asarray(values, dtype=np.int32)
    shape = values.shape
    if 0 in shape or values.size > LARGEST:
        return None
    wide = [dim for dim, size in enumerate(shape) if size > 1]
    if len(wide) < 2:
        return vector(values.reshape(-1), wide[0] if wide else 0, len(shape))
    dims = wide
    for dim in wide:
        first = values.take([0], dim)
        if bool((values == first).all()):
            values = first
            dims = [other for other in dims if other != dim]
    if len(dims) < 2:
        return vector(values.reshape(-1), dims[0] if dims else 0, len(shape))
    return _interned(values.shape, values)


def _interned(shape: tuple[int, ...], values: NDArray[np.int32]) -> Label | None:
    values = np.ascontiguousarray(values)
    key = shape, values.tobytes()
    found = _arrays.get(key)
    if found is not None:
        return found
    low, high = int(values.min()), int(values.max())
    if low == high:  # of one dimension
        return None if low == NONE else constant(low, len(shape))
    complete = low != NONE
    if not complete:
        low = int(values[values != NONE].min())
    if len(_arrays) > _KEPT:
        _arrays.clear()
    values.flags.writeable = False
    dims = tuple(dim for dim, size in enumerate(shape) if size > 1)
    found = _arrays[key] = Label(values, dims, low, high, complete)
    return found


@dataclass(slots=True, eq=False)
class Labels:
    """Of a tensor of this shape: which row, position and, where an element joins two positions, key it belongs to.

    `slot` and `key_slot` number the sequences whose positions these are, -1 for none. `bounds` are what every element
    may depend on besides, by slot the last position. `checks`, one bit each, have to hold for that to be all. `hidden`
    is what the elements are whose key is later than their position. `raw`: as it entered the model.
    """

    shape: tuple[int, ...]
    row: Label | None = None
    position: Label | None = None
    key: Label | None = None
    slot: int = -1
    key_slot: int = -1
    bounds: tuple[tuple[int, int], ...] = ()
    checks: int = 0
    hidden: int = OPEN
    raw: bool = False
    views: dict[tuple[Any, ...], "Labels"] = field(default_factory=dict, repr=False)
    stored: dict[tuple[int, ...], "Labels"] = field(default_factory=dict, repr=False)
    later: bool | None = field(default=None, repr=False)
    axes: Any = field(default=None, repr=False)  # what kernels are told, once somebody asked
    blank: bool = field(init=False)  # nothing is known of it, and it depends on nothing that entered

    def __post_init__(self) -> None:
        self.blank = self.row is None and self.position is None and not self.bounds and not self.checks

    @property
    def pairs(self) -> bool:
        return self.key is not None

    def upto(self) -> dict[int, int]:
        """By slot, the last position that any element may depend on."""
        found = dict(self.bounds)
        for part, slot in ((self.position, self.slot), (self.key, self.key_slot)):
            if part is not None:
                found[slot] = max(found.get(slot, NONE), part.high)
        return found

    def has_later(self) -> bool:
        """Whether some element joins a position with a later key of the same sequence."""
        if self.later is None:
            self.later = bool(self.where_later().any())
        return self.later

    def where_later(self) -> NDArray[np.bool_]:
        if self.key is None or self.position is None or self.slot != self.key_slot:
            return np.zeros((1,) * len(self.shape), bool)
        later: NDArray[np.bool_] = (self.key.values > self.position.values) & (self.position.values != NONE)
        return later


_labels: dict[tuple[Any, ...], Labels] = {}


def labels(
    shape: tuple[int, ...],
    row: Label | None = None,
    position: Label | None = None,
    key: Label | None = None,
    *,
    slot: int = -1,
    key_slot: int = -1,
    bounds: Mapping[int, int] | None = None,
    checks: int = 0,
    hidden: int = OPEN,
    raw: bool = False,
) -> Labels:
    """The one object for these."""
    if position is None:
        position, slot, key, key_slot = key, key_slot, None, -1
    if key is None:
        key_slot, hidden = -1, OPEN
    if position is None:
        slot = -1
    beyond: tuple[tuple[int, int], ...] = ()
    if bounds:  # but those that each element's own position implies
        least = position.low if position is not None and position.complete else NONE
        beyond = tuple(sorted((at, last) for at, last in bounds.items() if at != slot or last > least))
    name = shape, row, position, key, slot, key_slot, beyond, checks, hidden, raw
    found = _labels.get(name)
    if found is None:
        if len(_labels) > _KEPT:
            _labels.clear()
        found = _labels[name] = Labels(shape, row, position, key, slot, key_slot, beyond, checks, hidden, raw)
    return found


def blank(shape: tuple[int, ...]) -> Labels:
    return labels(shape)


def spread(parts: Iterable[Labels], shape: tuple[int, ...]) -> Labels:
    """Of something that may be made of anything in `parts`: it belongs nowhere, and depends on all of them."""
    bounds, checks = beyond(parts, whole=True)
    return labels(shape, bounds=bounds, checks=checks)


def beyond(parts: Iterable[Labels], *, whole: bool = False) -> tuple[dict[int, int], int]:
    """The bounds and checks of all; `whole`: of all that they depend on, what they are labelled by too."""
    bounds: dict[int, int] = {}
    checks = 0
    for part in parts:
        widen(bounds, part.upto() if whole else dict(part.bounds))
        checks |= part.checks
    return bounds, checks


def widen(bounds: dict[int, int], more: Mapping[int, int]) -> None:
    for slot, last in more.items():
        bounds[slot] = max(bounds.get(slot, NONE), last)


def changed(
    of: Labels, shape: tuple[int, ...], change: Callable[[Array], NDArray[Any] | None], *, hidden: int | None = None
) -> Labels:
    """The labels of elements that were moved: `change` moves an array's, or returns None where they are lost."""
    bounds = dict(of.bounds)
    made: list[Label | None] = []
    for part, slot in ((of.row, -1), (of.position, of.slot), (of.key, of.key_slot)):
        if part is None or not part.dims:
            made.append(None if part is None else constant(part.low, len(shape)))
            continue
        moved = change(part.values)
        if moved is None and slot >= 0:
            widen(bounds, {slot: part.high})
        made.append(None if moved is None else label(moved))
    row, position, key = made
    return labels(
        shape,
        row,
        position,
        key,
        slot=of.slot,
        key_slot=of.key_slot,
        bounds=bounds,
        checks=of.checks,
        hidden=of.hidden if hidden is None else hidden,
        raw=of.raw,
    )


def aligned(values: Array, ndim: int) -> Array:
    """With dimensions of size 1 in front, as broadcasting adds them."""
    return values.reshape((1,) * (ndim - values.ndim) + values.shape)


def fits(*shapes: Sequence[int]) -> bool:
    """Whether an array of the shape that these broadcast to is not too large."""
    size = 1
    for sizes in zip(*shapes, strict=True):
        size *= max(sizes)
    return size <= LARGEST
