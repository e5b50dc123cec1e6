"""The arithmetic that bounds hold for, and what rounding adds to a bound.

The assumptions are those of the kit's model with `rounding="transformers"`, on any device that follows them: weights
are rounded to the dtype first, and bounds are for the rounded ones; norms and softmax are computed in float32; products
are summed in float32, in any order, and the sum is rounded once to the dtype; every other operator computes its result
in float32 and rounds it once. One operation in float32 may have a relative error of 2^-23, twice that of rounding to
nearest, which covers cores that truncate. Not covered: sums in float16, and hardware that flushes float32 subnormals.

Rounding x to a format with unit roundoff u and smallest subnormal 2η gives x(1 + δ) + ε with |δ| <= u, |ε| <= η, and
one of the two is zero. The format is taken to have no maximum: a bound above it says what would have to be stored, and
no bound assumes that other tensors stay in range. Where all bounds are within the range, no tensor of any prompt
overflows, by induction over the order of execution.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.formats import NumberFormat

WIDE = 2.0**-23
"""Relative error of one operation in float32, twice that of rounding to nearest."""

_OUTWARD = 1 + 1e-9
"""A margin above all that float64 loses while a bound is computed: sums of 10^6 terms lose 1e-10."""

_SHIFT = 2.0**10
"""Added to a gain, in units of η, so that the rounding of subnormals becomes part of the ball."""


@dataclass(frozen=True, slots=True)
class Ball:
    """The vectors {gain ∘ m : ||m||_2 <= radius}; `gain` [E] float64, not negative."""

    gain: Tensor
    radius: float


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Unit roundoff `unit` of the dtype in which results are stored, and half of its smallest subnormal, `tiny`."""

    unit: float
    tiny: float

    @classmethod
    def of(cls, form: NumberFormat) -> "Arithmetic":
        return cls(unit=form.unit_roundoff, tiny=form.smallest_subnormal / 2)

    def stored(self, bound: Tensor, operations: int = 0) -> Tensor:
        """A bound on the stored value, after `operations` more float32 operations and one rounding."""
        return (bound * (1 + WIDE) ** operations * (1 + self.unit) + self.tiny) * _OUTWARD

    def product_error(self, terms: int, roundings: int = 1) -> float:
        """Of a stored sum of products, relative to Σ|a||b|: (1 + γ)(1 + u) − 1; `subnormals` are added to that."""
        return (1 + sum_error(terms)) * (1 + self.unit) ** roundings - 1

    def subnormals(self, roundings: int) -> float:
        """η for one rounding; of several each is followed by the relative errors of those after it."""
        return self.tiny * sum((1 + self.unit) ** after for after in range(roundings))

    def norm_radius(self, channels: int, *, twice: bool = False) -> float:
        """Of an RMSNorm's output ÷ gain, as computed and, but for subnormals, as stored; sqrt(d) if nothing is rounded.

        The mean square is a sum of d terms, none negative, so it is within γ_d of the exact one and its root within
        γ_d / 2; sixteen more operations are more than rsqrt and the two products take. Some norms round `twice`: what
        the gain multiplies, each channel by u and η, and the product.
        """
        computed = math.sqrt(channels) * (1 + sum_error(channels) / 2) * (1 + 16 * WIDE)
        once = computed * (1 + self.unit) * _OUTWARD
        return (once + math.sqrt(channels) * self.tiny) * (1 + self.unit) * _OUTWARD if twice else once

    def norm_ball(self, gain: Tensor, *, twice: bool = False) -> Ball:
        """A ball that holds every stored output of an RMSNorm with this gain [d], as `norm_radius` rounds it.

        A stored output is g ∘ m + ε with ||m|| <= r and |ε_i| <= η. With a shift s it is (|g| + s) ∘ m', and since
        (|g_i| |m_i| + η) / (|g_i| + s) is a mean of |m_i| and η / s, ||m'||² <= r² + d (η / s)².
        """
        radius = math.hypot(self.norm_radius(len(gain), twice=twice), math.sqrt(len(gain)) / _SHIFT)
        return Ball(gain.abs() + _SHIFT * self.tiny, radius * _OUTWARD)

    @property
    def rotation_growth(self) -> float:
        """How much longer RoPE as computed makes a pair of channels, 1 if nothing is rounded.

        cos and sin are off by u and 2^-22 (so much float32 loses), each of the products by u, and their sum by u. Two
        channels with errors of up to u of the pair's length are off by sqrt(2) u together.
        """
        return (1 + 2 * self.unit + 2.0**-20) * (1 + 2 * self.unit) * (1 + self.unit)

    @property
    def rotation_tiny(self) -> float:
        """What subnormal products add to the length of a rotated pair: 2η in each channel, rounded up."""
        return 4 * self.tiny

    def rotated(self, ball: Ball) -> Ball:
        """A ball of pairs' lengths [D / 2] that holds the rotated vectors of `ball` [D], in pairs (i, i + D / 2).

        A rotation keeps the length of a pair, which is at most max(g_i, g_j) · ||(m_i, m_j)||. Subnormals are absorbed
        as in `norm_ball`.
        """
        first, second = ball.gain.chunk(2)
        gain = torch.maximum(first, second) * self.rotation_growth
        added = math.sqrt(len(gain)) * self.rotation_tiny / (_SHIFT * self.tiny)
        return Ball(gain + _SHIFT * self.tiny, math.hypot(ball.radius, added) * _OUTWARD)


def sum_error(terms: int) -> float:
    """γ of a sum of `terms` products in float32, in any order: it is off by γ · Σ|a||b| at most."""
    return terms * WIDE / (1 - terms * WIDE)


def outward(bound: Tensor) -> Tensor:
    """`bound`, computed in float64, with a margin above all that float64 lost."""
    return bound * _OUTWARD
