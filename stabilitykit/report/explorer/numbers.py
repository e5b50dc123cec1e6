"""Numbers as the explorer's JSON holds them: as many digits as are shown, in as little room as they need."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from stabilitykit.formats import NumberFormat

BY_POSITION, BY_LENGTH = 16, 32  # steps to a power of two
NOTHING = -9999  # the step of a magnitude that is zero, or not known


def short(value: float | None, digits: int = 4) -> Any:
    """A JSON number of so many significant digits; NaN and infinities by name, None as it is."""
    if value is None:
        return None
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    short = float(f"{value:.{digits - 1}e}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def differences(values: Sequence[int]) -> list[int]:
    """Each number less the one before it: small numbers take little room."""
    return [*values[:1], *(later - earlier for earlier, later in pairwise(values))]


def in_steps(values: npt.ArrayLike, steps: int, form: NumberFormat) -> npt.NDArray[np.int64]:
    """log2 in so many steps to a power of two, on the side of `form`'s maximum on which the value is."""
    magnitudes = np.asarray(values, dtype=np.float64)
    known = np.isfinite(magnitudes) & (magnitudes > 0)
    found = np.rint(steps * np.log2(np.where(known, magnitudes, 1.0)))
    edge, tie = form.overflow_edge
    if math.isfinite(edge):
        past = magnitudes >= edge if tie else magnitudes > edge
        first = math.ceil(steps * math.log2(edge)) if tie else math.floor(steps * math.log2(edge)) + 1
        found = np.where(past, np.maximum(found, first), np.minimum(found, first - 1))
    return np.where(known, found, NOTHING).astype(np.int64)
