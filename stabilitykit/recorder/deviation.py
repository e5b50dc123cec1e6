"""How far a tensor is from the same site of a reference run."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.formats import NumberFormat
from stabilitykit.records import Deviation

_EXPONENT = 0x7FF << 52  # a float64's bits without sign and significand


@dataclass(frozen=True, slots=True)
class DeviationTally:
    """Elements compared, the sums of squared errors and of squared references, the largest error, and that in ulp."""

    numbers: Tensor  # float64, on the tensors' device

    def result(self) -> Deviation:
        compared, noise, signal, largest, largest_ulp = self.numbers.tolist()
        if compared == 0:
            return Deviation(sqnr=None, largest=None, largest_ulp=None, compared=0)
        ratio = math.log10(signal / noise) if signal and noise else math.inf
        return Deviation(
            sqnr=10 * ratio if signal else None, largest=largest, largest_ulp=largest_ulp, compared=int(compared)
        )

    def joined(self, other: "DeviationTally | None") -> "DeviationTally":
        """That of both parts of one tensor."""
        if other is None:
            return self
        return DeviationTally(
            torch.cat([self.numbers[:3] + other.numbers[:3], self.numbers[3:].maximum(other.numbers[3:])])
        )


def measure_deviation(tensor: Tensor, reference: Tensor, stored: NumberFormat) -> DeviationTally | None:
    """`Deviation` of `tensor` from `reference`, in float64; None where their shapes differ.

    An element counts where it is finite in both. A unit in the last place is that of `stored` at the reference's
    magnitude, that of its smallest normal number below that. Nothing waits for the tensors' device.
    """
    if tensor.shape != reference.shape:
        return None
    if tensor.numel() == 0:
        return DeviationTally(torch.zeros(5, dtype=torch.float64))
    ours, theirs = tensor.reshape(-1).double(), reference.reshape(-1).double()
    both = ours.isfinite() & theirs.isfinite()
    theirs = theirs.where(both, 0.0)
    error = (ours - theirs).abs_().where(both, 0.0)
    magnitude = theirs.abs().clamp_min_(stored.smallest_normal)
    power = (magnitude.view(torch.int64) & _EXPONENT).view(torch.float64)  # of two, at most the magnitude
    ulps = (error / power).max() * 2.0 ** (stored.precision - 1)
    sums = (both.sum().double(), error.dot(error), theirs.dot(theirs), error.max(), ulps)
    return DeviationTally(torch.stack(sums))
