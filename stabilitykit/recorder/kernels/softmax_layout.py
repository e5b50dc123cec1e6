"""What every kernel writes of a softmax, and where: a row of float64, of any number of blocks that can be merged.

First come the `Field`s, then for each head `HEAD_FIELDS`: the least entropy, the sum of entropies, and over how many
rows. Extremes of nothing are -inf, or inf where the least is meant.
"""

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Field(IntEnum):
    """BOTH_ROWS count the NaN rows that are fully masked too; the rest is as in `records.Softmax`."""

    MAX_LOGIT = 0
    RANGE = 1
    MAX_PROBABILITY = 2
    SUM_ERROR = 3
    VISIBLE = 4
    UNDERFLOWED = 5
    MASKED_ROWS = 6
    NAN_ROWS = 7
    BOTH_ROWS = 8


FIELDS = len(Field)
HEAD_FIELDS = 3
_EXTREMES = slice(Field.MAX_LOGIT, Field.SUM_ERROR + 1)


def empty_row(heads: int) -> NDArray[np.float64]:
    row = np.zeros(FIELDS + HEAD_FIELDS * heads)
    row[_EXTREMES] = -math.inf
    row[FIELDS::HEAD_FIELDS] = math.inf
    return row


def merged(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """One row that says of all blocks what each of `rows` says of one."""
    row: NDArray[np.float64] = rows.sum(axis=0)
    row[_EXTREMES] = rows[:, _EXTREMES].max(axis=0)
    row[FIELDS::HEAD_FIELDS] = rows[:, FIELDS::HEAD_FIELDS].min(axis=0)
    return row
