"""What storing the weights in a format does to them, in a sentence."""

from stabilitykit.formats import number_format
from stabilitykit.records import StoredWeights, WeightCounts
from stabilitykit.words import listed, number


def weights_sentence(stored: StoredWeights, *, saturating: bool = False) -> str:
    """What storing the checkpoint in a dtype does to its weights, by a cast that saturates or not; nothing where it
    does nothing.

    The parameter that is named has the most of what is worst: NaN and infinities, then what overflows, then the rest.
    """
    form = number_format(stored.dtype)
    becomes = "infinite" if form.has_infinities else "NaN"
    if form.saturates(asked=saturating):
        becomes = f"±{number(form.largest)}"
    counts = (
        (
            stored.nonfinite,
            "is NaN or infinite in the checkpoint itself",
            "are NaN or infinite in the checkpoint itself",
        ),
        (stored.overflow, f"becomes {becomes}", f"become {becomes}"),
        (stored.zero, "becomes zero", "become zero"),
        (stored.subnormal, "goes subnormal", "go subnormal"),
    )
    parts = [f"{count:,} {one if count == 1 else many}" for count, one, many in counts if count]
    if not parts:
        return ""
    worst, total = stored.worst[0], stored.nonfinite or stored.overflow
    named = _one(worst) if total == 1 and worst.value is not None else f"mostly in {worst.name}"
    if len(parts) == 1:
        return f"Of {stored.elements:,} weights stored in {stored.dtype}, {parts[0]}, {named}."
    return f"Of {stored.elements:,} weights stored in {stored.dtype}, {listed([f'{parts[0]} ({named})', *parts[1:]])}."


def element(counts: WeightCounts) -> str:
    """`up_proj.weight[7, 9] is 70,000`; the name alone where no element is known."""
    if counts.index is None:
        return counts.name
    return (
        counts.name + _at(counts) if counts.value is None else f"{counts.name}{_at(counts)} is {number(counts.value)}"
    )


def _one(counts: WeightCounts) -> str:
    """`up_proj.weight[7, 9], 70,000`"""
    return f"{counts.name}{_at(counts)}, {number(counts.value)}"


def _at(counts: WeightCounts) -> str:
    return "" if counts.index is None else f"[{', '.join(map(str, counts.index))}]"
