"""Binary floating-point formats: one literal each, everything else derived.

>>> FLOAT16.largest, FLOAT16.smallest_subnormal == 2.0**-24
(65504.0, True)
>>> FLOAT16.overflows(65519.99), FLOAT16.overflows(65520.0)
(False, True)
"""

import math
from dataclasses import dataclass

from stabilitykit.errors import MisuseError


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """A binary format with subnormals, rounded to nearest, ties to even.

    `precision` counts significand bits, the implicit leading one included. `emax` and `emin` are the
    exponents of the largest and the smallest normal number (IEEE 754 convention, significand in [1, 2)).
    `all_ones_is_nan` marks formats of the OCP "fn" kind: no infinity, and of the codes with the largest
    exponent only the one with an all-ones significand is not a number.
    """

    name: str
    precision: int
    emax: int
    emin: int
    bits: int
    all_ones_is_nan: bool = False

    @property
    def largest(self) -> float:
        """Largest finite value."""
        unused = 2 if self.all_ones_is_nan else 1
        return math.ldexp(2.0**self.precision - unused, self.emax - self.precision + 1)

    @property
    def smallest_normal(self) -> float:
        return math.ldexp(1.0, self.emin)

    @property
    def smallest_subnormal(self) -> float:
        return math.ldexp(1.0, self.emin - self.precision + 1)

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding a number in the normal range."""
        return math.ldexp(1.0, -self.precision)

    @property
    def overflow_edge(self) -> tuple[float, bool]:
        """The magnitude halfway past `largest`, and whether a value exactly there already overflows.

        Ties go to the even significand. Where every code up to infinity is used the largest
        significand is odd, so the tie overflows (65,520 in float16); in the "fn" formats it is even,
        so the tie comes back (464 becomes 448 in float8_e4m3fn).
        """
        if self.precision == 53:  # halfway past the largest double is no double: only infinity is there
            return math.inf, True
        half_ulp = math.ldexp(1.0, self.emax - self.precision)
        return self.largest + half_ulp, not self.all_ones_is_nan

    def overflows(self, value: float) -> bool:
        """Whether rounding `value` leaves the finite range. Infinities and NaN do; ±0 does not."""
        edge, tie_overflows = self.overflow_edge
        magnitude = abs(value)
        return math.isnan(value) or magnitude > edge or (magnitude == edge and tie_overflows)

    def headroom(self, amax: float) -> float:
        """log2(largest / amax), in bits: negative past the range, inf for amax 0, -inf for inf, NaN for NaN."""
        if amax == 0:
            return math.inf
        if not math.isfinite(amax):
            return -amax
        (top, high), (part, low) = math.frexp(self.largest), math.frexp(amax)
        return math.log2(top / part) + high - low


FLOAT64 = NumberFormat(name="float64", precision=53, emax=1023, emin=-1022, bits=64)
FLOAT32 = NumberFormat(name="float32", precision=24, emax=127, emin=-126, bits=32)
BFLOAT16 = NumberFormat(name="bfloat16", precision=8, emax=127, emin=-126, bits=16)
FLOAT16 = NumberFormat(name="float16", precision=11, emax=15, emin=-14, bits=16)
FLOAT8_E5M2 = NumberFormat(name="float8_e5m2", precision=3, emax=15, emin=-14, bits=8)
FLOAT8_E4M3FN = NumberFormat(name="float8_e4m3fn", precision=4, emax=8, emin=-6, bits=8, all_ones_is_nan=True)

FORMATS: dict[str, NumberFormat] = {
    form.name: form for form in (FLOAT64, FLOAT32, BFLOAT16, FLOAT16, FLOAT8_E5M2, FLOAT8_E4M3FN)
}


def number_format(name: str) -> NumberFormat:
    """The format called `name`; torch's names with the `torch.` prefix are understood.

    Raises MisuseError, listing the known names, for any other.
    """
    try:
        return FORMATS[name.removeprefix("torch.")]
    except KeyError:
        raise MisuseError(f"A number format is one of {', '.join(FORMATS)}; {name!r} is none of them.") from None
