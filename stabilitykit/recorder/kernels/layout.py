"""What every kernel writes of a tensor, and where: a row of float64, in which counts up to 2^53 are exact.

First come the `Field`s, then the number of elements whose magnitude code is at least each of `Edges.codes`, then the
number whose exponent, floor(log2|x|), is `Edges.lowest`, `Edges.lowest` + 1 and so on.

A magnitude code is the bits below the sign, read as an integer: it grows with the magnitude. 16-bit numbers count by
the code of the same number in float32, which holds all of them.
"""

import math
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from stabilitykit.formats import NumberFormat, number_format


class Field(IntEnum):
    """MASKED elements enter nothing else. AMAX and those after it are over finite elements; AMAX is -1 without any.

    INDEX is the row-major index of the first element of magnitude AMAX. SMALLEST is inf where all are zero. SQUARES is
    the sum of (x / SCALE)². SHRUNK is the sum of x / `SHRINK` where SUM, that of x, may have overflowed: of float64.
    """

    MASKED = 0
    NAN = 1
    PLUS = 2
    MINUS = 3
    AMAX = 4
    INDEX = 5
    SMALLEST = 6
    MINIMUM = 7
    MAXIMUM = 8
    SUM = 9
    SQUARES = 10
    SCALE = 11
    SHRUNK = 12


SHRINK = 2.0**64
"""More than any tensor's elements: so many float64 numbers divided by it have a sum in float64's range."""

FIELDS = len(Field)

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
"""The dtypes that kernels read; other floating and complex tensors are brought into one of them."""

_CODES = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edges:
    """The codes that tensors of one dtype are counted against, for a choice of formats.

    `codes` ascend and hold none that exponents tell anyway. A count is asked for by `at_least`'s keys: how many
    elements have a code of at least that.
    """

    wide: torch.dtype
    codes: NDArray[np.int64]
    lowest: int
    bins: int
    at_least: dict[int, int]  # place in a row, of codes[i] or of an exponent's bin
    formats: dict[str, tuple[int, int, int]]  # not rounded to zero, not to a subnormal, overflowing
    normal: int
    own_lowest: int
    count: int = field(init=False)  # of codes
    address: int = field(init=False)  # of codes in memory
    width: int = field(init=False)  # of a row

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", len(self.codes))
        object.__setattr__(self, "address", int(self.codes.ctypes.data))
        object.__setattr__(self, "width", FIELDS + len(self.codes) + self.bins)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose codes a tensor of this dtype is counted by."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=64)
def edges(dtype: torch.dtype, formats: tuple[str, ...]) -> Edges:
    """For tensors of a dtype of `FLOATS`."""
    own, counted = number_format(str(dtype)), number_format(str(wide(dtype)))
    lowest = counted.emin - counted.precision + 1
    bins = counted.emax - lowest + 1
    asked_for = {name: thresholds(number_format(name), wide(dtype)) for name in formats}
    normal = code_at(own.smallest_normal, wide(dtype))
    powers = {code_at(math.ldexp(1.0, lowest + i), wide(dtype)): i for i in range(bins)}
    infinity = infinity_code(wide(dtype))
    asked = {normal, *(code for codes in asked_for.values() for code in codes)}
    codes = sorted(code for code in asked if code not in powers and code < infinity)
    places = {code: FIELDS + i for i, code in enumerate(codes)}
    places |= {code: FIELDS + len(codes) + i for code, i in powers.items() if code in asked}
    places |= {code: FIELDS + len(codes) + bins for code in asked if code >= infinity}  # none: past the last bin
    return Edges(
        wide=wide(dtype),
        codes=np.array(codes, dtype=np.int64),
        lowest=lowest,
        bins=bins,
        at_least=places,
        formats=asked_for,
        normal=normal,
        own_lowest=own.emin - own.precision + 1,
    )


def magnitude_code(value: float, dtype: torch.dtype) -> int:
    bits = torch.tensor(value, dtype=torch.float64).to(dtype).view(_CODES[dtype])
    return int(bits & torch.iinfo(bits.dtype).max)


@cache
def infinity_code(dtype: torch.dtype) -> int:
    return magnitude_code(math.inf, dtype)


def code_at(value: float, dtype: torch.dtype, *, above: bool = False) -> int:
    """The smallest magnitude code of `dtype` whose value is at least `value` (`above`: greater than it)."""
    code = magnitude_code(value, dtype)
    held = float(torch.tensor(code, dtype=_CODES[dtype]).view(dtype))
    return code + 1 if held < value or (above and held == value) else code


@lru_cache(maxsize=64)
def thresholds(target: NumberFormat, dtype: torch.dtype) -> tuple[int, int, int]:
    """Codes of `dtype` from which rounding to `target` no longer gives zero, a subnormal, a finite value.

    Half the smallest subnormal is a tie that goes to zero; half of it below the smallest normal is one that
    goes to the normal.
    """
    infinity = infinity_code(dtype)
    half = target.smallest_subnormal / 2  # 0.0 for float64, whose thresholds are then exact anyway
    edge, tie_overflows = target.overflow_edge
    not_zero = code_at(half, dtype, above=True) if half else 1
    return (
        min(not_zero, infinity),
        min(code_at(target.smallest_normal - half, dtype), infinity),
        min(code_at(edge, dtype, above=not tie_overflows), infinity),
    )
