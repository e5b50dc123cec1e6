"""Another format of the same size, with float32's range and an eighth of float16's precision."""

from stabilitykit.remedies.remedy import Remedy
from stabilitykit.remedies.seen import Seen

BFLOAT16 = Remedy(
    name="bfloat16",
    summary="Stores everything in bfloat16: float32's range, and three bits of precision fewer than float16.",
    dtype="bfloat16",
)


def bfloat16(seen: Seen) -> Remedy:
    """For every model."""
    return BFLOAT16
