"""Which dimension of a tensor counts batch rows, positions, heads and channels: what kernels are told of its labels.

An element of attention scores joins a query and a key, and exists only in prompts that hold both: it belongs to the
later of the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from stabilitykit.recorder.places.labels import Label, Labels


@dataclass(frozen=True, slots=True)
class Axes:
    """The shape that gives every axis of a tensor a dimension of its own, the last one the channel; which is which.

    Positions count from `start` on and, with `pairs`, channels from `first_key` on. All elements belong to the row
    `only_row` where no dimension counts rows. `slot` is the number of the stream that positions are of. Elements in an
    order that no dimension counts, such as those an expert was given, are told by `labels` one by one (`scattered`).
    """

    shape: tuple[int, ...]
    row: int | None = None
    position: int | None = None
    head: int | None = None
    pairs: bool = False  # the channel counts positions too
    start: int = 0
    first_key: int = 0
    only_row: int | None = None
    slot: int = 0
    scattered: bool = False
    labels: "Labels | None" = None

    def fold(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.shape)

    @property
    def positioned(self) -> bool:
        """Whether elements belong to positions at all."""
        return self.position is not None or (self.scattered and self.labels is not None and bool(self.labels.position))

    def row_of(self, place: Sequence[int]) -> int | None:
        """The row that the element at this index of the folded tensor belongs to."""
        if self.scattered and self.labels is not None:
            return None if self.labels.row is None else self.labels.row.at(place)
        return self.only_row if self.row is None else place[self.row]

    def position_of(self, place: Sequence[int]) -> int | None:
        """The position that the element at this index of the folded tensor belongs to."""
        if self.scattered and self.labels is not None:
            return _later(self.labels, place)
        if self.position is None:
            return None
        position = place[self.position] + self.start
        return max(position, place[-1] + self.first_key) if self.pairs else position

    def rows_of(self, places: Tensor) -> Tensor | None:
        """As `row_of`, of as many elements as there are rows of indices; -1 where one has none."""
        if self.scattered and self.labels is not None:
            return _looked_up(self.labels.row, places, missing=-1)
        if self.row is not None:
            return places[:, self.row]
        return None if self.only_row is None else torch.full_like(places[:, 0], self.only_row)

    def positions_of(self, places: Tensor) -> Tensor | None:
        """As `position_of`, of as many elements as there are rows of indices; `NOWHERE` where one has none."""
        if self.scattered and self.labels is not None:
            found = _looked_up(self.labels.position, places, missing=NOWHERE)
            if found is not None and self.labels.key is not None and self.labels.key_slot == self.labels.slot:
                key = _looked_up(self.labels.key, places, missing=NOWHERE)
                assert key is not None
                found = torch.where(key == NOWHERE, found, found.maximum(key))
            return found
        if self.position is None:
            return None
        positions = places[:, self.position] + self.start
        return positions.maximum(places[:, -1] + self.first_key) if self.pairs else positions

    def lost_of(self, lost: Tensor) -> Tensor | None:
        """How many rows and positions hold one of the elements that are True; None where positions are not known."""
        if self.position is not None:
            folded = lost.reshape(self.shape)
            kept = {dim for dim in (self.row, self.position) if dim is not None}
            others = [dim for dim in range(folded.ndim) if dim not in kept]
            return (folded.any(dim=others) if others else folded).sum()
        codes = self._codes()
        if codes is None:
            return None
        others = [dim for dim, size in enumerate(codes.shape) if size == 1]
        some = lost.any(dim=others, keepdim=True) if others else lost
        places = torch.from_numpy(codes).to(lost.device).expand(some.shape).reshape(-1)
        found = torch.zeros(int(codes.max()) + 2, dtype=torch.int32, device=lost.device)
        found.scatter_reduce_(0, places + 1, some.reshape(-1).int(), "amax")
        return found[1:].sum()

    @property
    def positions(self) -> int | None:
        """How many positions of how many rows there are."""
        if self.position is not None:
            return (1 if self.row is None else self.shape[self.row]) * self.shape[self.position]
        codes = self._codes()
        return None if codes is None else int(codes.max()) + 1

    def _codes(self) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None":
        """A number for each row and position that elements are scattered over, -1 for none; broadcasts to the shape."""
        of = self.labels
        if not self.scattered or of is None or of.position is None:
            return None
        row = np.zeros((1,) * len(of.shape), np.int64) if of.row is None else of.row.values.astype(np.int64)
        position = of.position.values.astype(np.int64)
        both = np.where(position == NOWHERE, -(2**62), row * 2**32 + position - of.position.low)
        names, codes = np.unique(both, return_inverse=True)
        codes = codes.reshape(both.shape) - int(names[0] == -(2**62))
        return np.asarray(codes, np.int64)


NOWHERE = -(2**31)


def _later(labels: "Labels", place: Sequence[int]) -> int | None:
    position = None if labels.position is None else labels.position.at(place)
    if labels.key is None or labels.key_slot != labels.slot:
        return position
    key = labels.key.at(place)
    return max((one for one in (position, key) if one is not None), default=None)


def _looked_up(label: "Label | None", places: Tensor, *, missing: int) -> Tensor | None:
    if label is None:
        return None
    values = torch.from_numpy(label.values.astype(np.int64)).to(places.device)
    values = torch.where(values == NOWHERE, missing, values)
    index = tuple(places[:, d] if size > 1 else torch.zeros_like(places[:, 0]) for d, size in enumerate(values.shape))
    return values[index] if index else values.expand(len(places))


@lru_cache(maxsize=4096)
def axes_of(shape: tuple[int, ...], rows: int | None, length: int | None, pairs: bool = False) -> Axes:
    """The axes of a tensor of this shape in a pass of `rows` sequences of `length` tokens, for lack of anything better.

    The shapes of a decoder: `[B, L, D]`, `[B, H, L, D]`, `[B, L, H, D]` and, once matrix products are flattened,
    `[B·L, D]` and `[B·H, L, D]`. What has one vector a row (`[B, D]`, `[B, 1, D]`) belongs to the last position. Where
    two dimensions are L long, the later one is taken. With `rows` or `length` None no axis is named. `pairs` counts
    only where there is a position axis.
    """
    found = _axes_of(tuple(shape), rows, length)
    return replace(found, pairs=True) if pairs and found.position is not None else found


def _axes_of(shape: tuple[int, ...], rows: int | None, length: int | None) -> Axes:
    if rows is None or length is None or len(shape) < 2:
        return Axes(shape)
    if len(shape) == 2:
        if shape[0] == rows * length:
            return Axes((rows, length, shape[1]), row=0, position=1)
        if shape[0] == length:
            return Axes(shape, position=0)
        return Axes((rows, 1, shape[1]), row=0, position=1, start=length - 1) if shape[0] == rows else Axes(shape)
    if len(shape) == 3:
        if shape[1] == length:
            if shape[0] == rows:
                return Axes(shape, row=0, position=1)
            if shape[0] > rows and shape[0] % rows == 0:
                return Axes((rows, shape[0] // rows, *shape[1:]), row=0, head=1, position=2)
            return Axes(shape, position=1)
        if shape[0] == rows and shape[1] == 1:
            return Axes(shape, row=0, position=1, start=length - 1)
        return Axes(shape)
    row = 0 if shape[0] == rows else None
    if shape[2] == length:
        return Axes(shape, row=row, head=1, position=2)
    if shape[1] == length:
        return Axes(shape, row=row, position=1, head=2)
    return Axes(shape)
