"""How far a tensor is from the same site of a reference run."""

import math

import torch
from torch import Tensor

from stabilitykit.formats import NumberFormat
from stabilitykit.records import Deviation


def measure_deviation(tensor: Tensor, reference: Tensor, stored: NumberFormat) -> Deviation | None:
    """`Deviation` of `tensor` from `reference`, in float64; None where their shapes differ.

    An element counts where it is finite in both. A unit in the last place is that of `stored` at the reference's
    magnitude, that of its smallest normal number below that.
    """
    if tensor.shape != reference.shape:
        return None
    ours, theirs = tensor.reshape(-1).double(), reference.reshape(-1).double()
    both = ours.isfinite() & theirs.isfinite()
    compared = int(both.sum())
    if compared == 0:
        return Deviation(sqnr=None, largest=None, largest_ulp=None, compared=0)
    if compared < ours.numel():
        ours, theirs = ours[both], theirs[both]
    error = (ours - theirs).abs()
    noise, signal = float(error.square().sum()), float(theirs.square().sum())
    magnitude = theirs.abs().clamp_min(stored.smallest_normal)
    _, exponent = torch.frexp(magnitude)  # of a significand in [1/2, 1)
    ulp = torch.ldexp(torch.ones_like(theirs), exponent - stored.precision)
    ratio = math.log10(signal / noise) if signal and noise else math.inf
    return Deviation(
        sqnr=10 * ratio if signal else None,
        largest=float(error.max()),
        largest_ulp=float((error / ulp).max()),
        compared=compared,
    )
