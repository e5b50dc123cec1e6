"""What storing a checkpoint in a format does to its weights, before anything runs."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from stabilitykit.formats import number_format
from stabilitykit.recorder.statistics import infinity_code, magnitude_codes, measurable, thresholds
from stabilitykit.records import StoredWeights, WeightCounts

_CHUNK = 1 << 20  # elements, which stay in a core's cache while they are looked at
_SHOWN = 5


def check_weights(
    tensors: Iterable[tuple[str, Tensor]], formats: Sequence[str], progress: Callable[[int], None] | None = None
) -> dict[str, StoredWeights]:
    """`StoredWeights` of named tensors for each format, exact, ties included, in one reading of every tensor.

    Counts are those of a cast to the nearest, ties to even. Tensors of integers, such as quantised weights, are passed
    over. `progress` is called with the bytes read, after each tensor.
    """
    found: dict[str, list[WeightCounts]] = {name: [] for name in formats}
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            for dtype, counts in zip(formats, _counts(name, tensor.detach(), formats), strict=True):
                found[dtype].append(counts)
        if progress is not None:
            progress(tensor.nbytes)
    return {dtype: _stored(dtype, counts) for dtype, counts in found.items()}


def _counts(name: str, tensor: Tensor, formats: Sequence[str]) -> list[WeightCounts]:
    sums = [[0, 0, 0] for _ in formats]
    nonfinite = 0
    for chunk in torch.split(tensor.reshape(-1), _CHUNK):
        values = measurable(chunk)
        codes = magnitude_codes(values)
        infinity = infinity_code(values.dtype)
        highest = int(codes.max())
        lost = int(torch.count_nonzero(codes >= infinity)) if highest >= infinity else 0
        nonfinite += lost
        for counts, dtype in zip(sums, formats, strict=True):
            not_zero, normal, over = thresholds(number_format(dtype), values.dtype)
            if highest >= over:
                counts[0] += int(torch.count_nonzero(codes >= over)) - lost
            small = codes < normal
            if bool(small.any()):
                below = codes[small]
                vanishing = int(torch.count_nonzero((below < not_zero) & (below > 0)))
                counts[1] += int(torch.count_nonzero(below >= not_zero))
                counts[2] += vanishing
    return [
        WeightCounts(
            name=name, elements=tensor.numel(), overflow=over, subnormal=subnormal, zero=zero, nonfinite=nonfinite
        )
        for over, subnormal, zero in sums
    ]


def _stored(dtype: str, counts: Sequence[WeightCounts]) -> StoredWeights:
    touched = [c for c in counts if c.overflow or c.subnormal or c.zero or c.nonfinite]
    touched.sort(key=lambda c: (c.nonfinite, c.overflow, c.zero + c.subnormal), reverse=True)
    return StoredWeights(
        dtype=dtype,
        elements=sum(c.elements for c in counts),
        overflow=sum(c.overflow for c in counts),
        subnormal=sum(c.subnormal for c in counts),
        zero=sum(c.zero for c in counts),
        nonfinite=sum(c.nonfinite for c in counts),
        worst=tuple(touched[:_SHOWN]),
    )
