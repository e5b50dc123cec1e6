"""Binary floating-point formats: one literal each, everything else derived.

>>> FLOAT16.largest, FLOAT16.smallest_subnormal == 2.0**-24
(65504.0, True)
>>> FLOAT16.overflows(65519.99), FLOAT16.overflows(65520.0)
(False, True)
"""

import math
from dataclasses import dataclass
from typing import Literal

from stabilitykit.errors import MisuseError


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """A signed binary format with subnormals, rounded to nearest, ties to even.

    `precision` counts significand bits, the implicit leading one included. `emax` and `emin` are the
    exponents of the largest and the smallest normal number (IEEE 754 convention, significand in [1, 2)).
    `high_nans` counts the significands that are NaN at the exponent `emax`: one in OCP's E4M3, none in formats
    that keep an exponent of their own for what is not finite, or that use every code there for a number.
    `past_maximum` is what a cast makes of a value past the largest: "inf", "NaN" in formats without infinities,
    "saturate" in those without NaN too (OCP's 6 and 4 bits). `has_negative_zero` is False where the code of −0 is
    NaN (the "fnuz" formats).
    """

    name: str
    precision: int
    emax: int
    emin: int
    bits: int
    high_nans: int = 0
    past_maximum: Literal["inf", "NaN", "saturate"] = "inf"
    has_negative_zero: bool = True

    @property
    def largest(self) -> float:
        """Largest finite value: the format's maximum."""
        return math.ldexp(2.0**self.precision - 1 - self.high_nans, self.emax - self.precision + 1)

    @property
    def has_infinities(self) -> bool:
        return self.past_maximum == "inf"

    @property
    def finite_codes(self) -> int:
        """How many of the 2^bits codes are finite numbers; ±0 are two, where there is a −0."""
        exponents = self.emax - self.emin + 2  # the subnormals' included
        return 2 * ((exponents << self.precision - 1) - self.high_nans) - (not self.has_negative_zero)

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

        Ties go to the even significand. Where every significand is used the largest is odd, so the tie
        overflows (65,520 in float16); where the last one is NaN it is even, so the tie comes back (464
        becomes 448 in float8_e4m3fn).
        """
        if self.precision == 53:  # halfway past the largest double is no double: only infinity is there
            return math.inf, True
        half_ulp = math.ldexp(1.0, self.emax - self.precision)
        return self.largest + half_ulp, self.high_nans % 2 == 0

    def overflows(self, value: float) -> bool:
        """Whether rounding `value` leaves the finite range. Infinities and NaN do; ±0 does not."""
        edge, tie_overflows = self.overflow_edge
        magnitude = abs(value)
        return math.isnan(value) or magnitude > edge or (magnitude == edge and tie_overflows)

    def saturates(self, *, asked: bool = False) -> bool:
        """Whether a cast makes ±`largest` of what overflows. `asked` to, casts to 8 bits and fewer do."""
        return self.past_maximum == "saturate" or (asked and self.bits <= 8)

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
FLOAT8_E4M3FN = NumberFormat(
    name="float8_e4m3fn", precision=4, emax=8, emin=-6, bits=8, high_nans=1, past_maximum="NaN"
)

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
        raise MisuseError(f"Unknown number format {name!r}; choose one of: {', '.join(FORMATS)}.") from None
