"""Where a block of queries stands in the whole tensor that the blocks make up.

Attention over a long prompt is computed by blocks of queries, so that memory does not grow with the square of its
length. Each operator then runs once a block, and its blocks are one record: that of the tensor they would have been.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.records import flat_index, index_at


class QueryBlock(Protocol):
    """What a module that computes by blocks has in its attribute `query_block` while it does, and None otherwise.

    The block's queries are `start` to `stop` of `queries`, its keys `first_key` to `last_key` of `keys`. Each block is
    an object of its own. Tensors that are made meanwhile have the queries in their last dimension but one.
    """

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def queries(self) -> int: ...
    @property
    def first_key(self) -> int: ...
    @property
    def last_key(self) -> int: ...
    @property
    def keys(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of `shape` as a part of one of shape `whole`, in whose last two dimensions it begins at `offsets`."""

    shape: tuple[int, ...]
    whole: tuple[int, ...]
    offsets: tuple[int, int]

    def index(self, flat: int) -> int:
        """Row-major index in the whole of the part's element `flat`."""
        *lead, query, last = index_at(flat, self.shape)
        return flat_index((*lead, query + self.offsets[0], last + self.offsets[1]), self.whole)

    def holds(self, flat: int) -> int | None:
        """Row-major index in the part of the whole's element `flat`; None where it is in another part."""
        *lead, query, last = index_at(flat, self.whole)
        inside = query - self.offsets[0], last - self.offsets[1]
        if not (0 <= inside[0] < self.shape[-2] and 0 <= inside[1] < self.shape[-1]):
            return None
        return flat_index((*lead, *inside), self.shape)

    def whole_axes(self, axes: Axes) -> Axes:
        """Those of the whole, from `axes`, those of the part."""
        if axes.position is None or axes.shape[-2:] != self.shape[-2:]:
            return Axes(self.whole)
        query, key = self.offsets
        return replace(
            axes,
            shape=(*axes.shape[:-2], *self.whole[-2:]),
            start=axes.start - query,
            first_key=axes.first_key - key,
        )


def part_of(shape: tuple[int, ...], block: QueryBlock, *, by_key: bool) -> Part | None:
    """The part that a tensor of this shape, made within `block`, is; None where it holds no block of queries.

    `by_key`: its last dimension counts the block's keys.
    """
    if len(shape) < 3 or shape[-2] != block.stop - block.start:
        return None
    whole = (*shape[:-2], block.queries, block.keys if by_key else shape[-1])
    return Part(shape, whole, (block.start, block.first_key if by_key else 0))
