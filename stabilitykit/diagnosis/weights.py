"""What storing the weights in a format does to them, in a sentence."""

from stabilitykit.formats import number_format
from stabilitykit.records import StoredWeights, WeightCounts
from stabilitykit.records.record import WeightCount
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
    kinds: tuple[tuple[WeightCount, str, str], ...] = (
        (
            "nonfinite",
            "is NaN or infinite in the checkpoint itself",
            "are NaN or infinite in the checkpoint itself",
        ),
        ("overflow", f"becomes {becomes}", f"become {becomes}"),
        ("zero", "becomes zero", "become zero"),
        ("subnormal", "goes subnormal", "go subnormal"),
    )
    parts: list[str] = []
    names: list[str] = []
    for kind, one, many in kinds:
        total = int(getattr(stored, kind))
        if total:
            parts.append(f"{total:,} {one if total == 1 else many}")
            names.append(_named(stored, kind, total, always=not names))
    if not parts:
        return ""
    told = f"{parts[0]}, {names[0]}"
    if len(parts) > 1:
        told = listed([f"{part} ({name})" if name else part for part, name in zip(parts, names, strict=True)])
    return f"Of {stored.elements:,} weights stored in {stored.dtype}, {told}."


def _named(stored: StoredWeights, kind: WeightCount, total: int, *, always: bool) -> str:
    """The one element, or the parameter that has most of them; empty where no parameter has half of them."""
    most = stored.most(kind)
    if most is None:
        return f"mostly in {stored.worst[0].name}" if always and stored.worst else ""
    if total == 1 and most.value is not None and kind in ("nonfinite", "overflow"):
        return _one(most)
    return f"mostly in {most.name}" if always or 2 * int(getattr(most, kind)) > total else ""


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
