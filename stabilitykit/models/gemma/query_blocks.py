"""Attention over long prompts by blocks of queries, so that memory does not grow with the square of their length.

A block's queries are multiplied with those keys alone that one of them may see: none after the last query, and of a
local layer none before the first one's window. What is left out would have had a probability of zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Scores of a pass that are still made whole: 256 MiB of float32, a prompt of 4,096 tokens with four heads.
WHOLE = 1 << 26
# Scores of one block where they are not.
BLOCK = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class QueryBlock:
    """Queries `start` to `stop` of `queries` new tokens, and keys `first_key` to `last_key` of `keys` tokens so far."""

    start: int
    stop: int
    queries: int
    first_key: int
    last_key: int
    keys: int

    @property
    def scores(self) -> int:
        """How many there are for one head of one sequence."""
        return (self.stop - self.start) * (self.last_key - self.first_key)


def query_blocks(heads: int, queries: int, keys: int, window: int | None) -> Sequence[QueryBlock]:
    """The blocks in which `queries` new tokens look at `keys` tokens, the new ones last; none where they fit whole.

    `heads` counts those of all sequences together; `window` is that of a local layer, or None.
    """
    if heads * queries * keys <= WHOLE:
        return ()
    past = keys - queries
    blocks = []
    start = 0
    while start < queries:
        first = 0 if window is None else max(0, past + start - window + 1)
        stop = min(queries, start + _most(BLOCK // heads, past + start - first))
        blocks.append(QueryBlock(start, stop, queries, first, past + stop, keys))
        start = stop
    return blocks


def _most(scores: int, before: int) -> int:
    """The largest n with n · (`before` + n) at most `scores`, or 1."""
    return max(1, int((before**2 / 4 + scores) ** 0.5 - before / 2))
