"""What storing a checkpoint in a format does to its weights, before anything runs."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from stabilitykit.checkpoints.mapped import read_once
from stabilitykit.recorder.statistics import measure
from stabilitykit.records import StoredWeights, WeightCounts

_SHOWN = 5


def check_weights(
    tensors: Iterable[tuple[str, Tensor]], formats: Sequence[str], progress: Callable[[int], None] | None = None
) -> dict[str, StoredWeights]:
    """`StoredWeights` of named tensors for each format, exact, ties included, in one reading of every tensor.

    Counts are those of a cast to the nearest, ties to even. Tensors of integers, such as quantised weights, are passed
    over. Of a mapped tensor a few rows at a time are in memory. `progress` is called with the bytes read, after each
    such piece.
    """
    found: dict[str, list[WeightCounts]] = {name: [] for name in formats}
    for name, tensor in tensors:
        is_counted = tensor.is_floating_point() and tensor.numel() > 0
        seen = []
        for piece in read_once(tensor):
            if is_counted:
                seen.append(measure(piece, formats))
            if progress is not None:
                progress(piece.nbytes)
        for dtype in formats if is_counted else ():
            counts = [piece.formats[dtype] for piece in seen]
            found[dtype].append(
                WeightCounts(
                    name=name,
                    elements=tensor.numel(),
                    overflow=sum(count.overflow for count in counts),
                    subnormal=sum(count.subnormal for count in counts),
                    zero=sum(count.zero for count in counts),
                    nonfinite=sum(piece.nonfinite for piece in seen),
                )
            )
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
