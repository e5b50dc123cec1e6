"""Which dimension of a tensor counts batch rows, token positions, heads and channels.

Shapes in a decoder of B rows, L tokens, H heads: `[B, L, D]`, `[B, H, L, D]`, `[B, L, H, D]`, and, once
matrix products are flattened, `[B·L, D]` and `[B·H, L, D]`. A tensor with one vector a row and no dimension of
length L (`[B, D]`, `[B, 1, D]`) belongs to the last position: logits and what a sampler makes of them. Where
two dimensions are L long, the later one is taken, which is right for `[B, H, L, D]` with H = L.

An element of the attention scores `[B, H, L, L]` joins a query and a key, and exists only in prompts that hold
both: it belongs to the later of the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Axes:
    """The shape that gives every axis of a tensor a dimension of its own, the last one the channel; which is which.

    Of a tensor that is a block of a larger one, `start` and `first_key` are where its positions and, with `pairs`, its
    channels begin.
    """

    shape: tuple[int, ...]
    row: int | None = None
    position: int | None = None
    head: int | None = None
    at_last: bool = False  # no position axis: belongs to the last position
    pairs: bool = False  # the channel counts positions too
    start: int = 0
    first_key: int = 0

    def fold(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.shape)

    def position_of(self, place: Sequence[int]) -> int | None:
        """The position that the element at this index of the folded tensor belongs to."""
        if self.position is None:
            return None
        position = place[self.position] + self.start
        return max(position, place[-1] + self.first_key) if self.pairs else position


@lru_cache(maxsize=4096)
def axes_of(shape: tuple[int, ...], rows: int | None, length: int | None, pairs: bool = False) -> Axes:
    """The axes of a tensor of this shape in a forward pass of `rows` sequences of `length` tokens.

    With `rows` or `length` None (no token sequence is known) no axis is named. `pairs` counts only where there is a
    position axis.
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
        return Axes(shape, row=0, at_last=True) if shape[0] == rows else Axes(shape)
    if len(shape) == 3:
        if shape[1] == length:
            if shape[0] == rows:
                return Axes(shape, row=0, position=1)
            if shape[0] > rows and shape[0] % rows == 0:
                return Axes((rows, shape[0] // rows, *shape[1:]), row=0, head=1, position=2)
            return Axes(shape, position=1)
        return Axes(shape, row=0, at_last=True) if shape[0] == rows and shape[1] == 1 else Axes(shape)
    row = 0 if shape[0] == rows else None
    if shape[2] == length:
        return Axes(shape, row=row, head=1, position=2)
    if shape[1] == length:
        return Axes(shape, row=row, position=1, head=2)
    return Axes(shape)
