"""Which dimension of a tensor counts batch rows, token positions, heads and channels.

Shapes in a decoder of B rows, L tokens, H heads: `[B, L, D]`, `[B, H, L, D]`, `[B, L, H, D]`, and, once
matrix products are flattened, `[B·L, D]` and `[B·H, L, D]`. A tensor with one vector a row and no dimension of
length L (`[B, D]`, `[B, 1, D]`) belongs to the last position: logits and what a sampler makes of them. Where
two dimensions are L long, the later one is taken, which is right for `[B, H, L, D]` with H = L.

An element of the attention scores `[B, H, L, L]` joins a query and a key, and exists only in prompts that hold
both: it belongs to the later of the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Folded:
    """A tensor, reshaped so that every axis is a dimension of its own; the last dimension is the channel."""

    tensor: Tensor
    row: int | None = None
    position: int | None = None
    head: int | None = None
    at_last: bool = False  # no position axis: belongs to the last position
    pairs: bool = False  # the channel counts positions too

    def position_of(self, place: Sequence[int]) -> int | None:
        """The position that the element at this index of `tensor` belongs to."""
        if self.position is None:
            return None
        return max(place[self.position], place[-1]) if self.pairs else place[self.position]


def fold(tensor: Tensor, rows: int | None, length: int | None) -> Folded:
    """`tensor` viewed with its axes told apart, for a forward pass of `rows` sequences of `length` tokens.

    With `rows` or `length` None (no token sequence is known) no axis is named.
    """
    shape = tensor.shape
    if rows is None or length is None or tensor.ndim < 2:
        return Folded(tensor)
    if tensor.ndim == 2:
        if shape[0] == rows * length:
            return Folded(tensor.reshape(rows, length, shape[1]), row=0, position=1)
        if shape[0] == length:
            return Folded(tensor, position=0)
        return Folded(tensor, row=0, at_last=True) if shape[0] == rows else Folded(tensor)
    if tensor.ndim == 3:
        if shape[1] == length:
            if shape[0] == rows:
                return Folded(tensor, row=0, position=1)
            if shape[0] > rows and shape[0] % rows == 0:
                heads = tensor.reshape(rows, shape[0] // rows, *shape[1:])
                return Folded(heads, row=0, head=1, position=2)
            return Folded(tensor, position=1)
        return Folded(tensor, row=0, at_last=True) if shape[0] == rows and shape[1] == 1 else Folded(tensor)
    row = 0 if shape[0] == rows else None
    if shape[2] == length:
        return Folded(tensor, row=row, head=1, position=2)
    if shape[1] == length:
        return Folded(tensor, row=row, position=1, head=2)
    return Folded(tensor)
