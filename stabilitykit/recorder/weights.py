"""What storing a checkpoint in a format does to its weights, before anything runs."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from stabilitykit.recorder.statistics import measure
from stabilitykit.records import StoredWeights, WeightCounts

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
            seen = measure(tensor, formats)
            for dtype, counts in seen.formats.items():
                found[dtype].append(
                    WeightCounts(
                        name=name,
                        elements=seen.elements,
                        overflow=counts.overflow,
                        subnormal=counts.subnormal,
                        zero=counts.zero,
                        nonfinite=seen.nonfinite,
                    )
                )
        if progress is not None:
            progress(tensor.nbytes)
    return {dtype: _stored(dtype, counts) for dtype, counts in found.items()}


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
