"""What a ranking of remedies comes to, in sentences."""

import math
import re
from collections.abc import Sequence

from stabilitykit.records.remedies import Change, Ranking, Score
from stabilitykit.records.repaired_folder import FolderCheck
from stabilitykit.records.scaling import Scaling
from stabilitykit.words import counted, listed, number

_FINITE_ANYWAY = "Nothing has to be changed: all values that were seen fit in float16"
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")  # of layers and experts, in a parameter's name


def recommendation(ranking: Ranking) -> str:
    """Which remedy is best and why, and which one a folder carries."""
    if not ranking.scores:
        return _unranked(ranking)
    best, carried = ranking.scores[0], ranking.repaired
    assert carried is not None
    if not best.finite:
        return "No remedy keeps the held-out texts finite."
    fits = ranking.scaled_headroom >= 0
    if not _is_changed(ranking) and carried.finite and fits and not ranking.proved:
        return _nothing_to_do(carried.headroom)
    said = f"Closest to float32 is {best.name}{_closer(best, ranking)}."
    if not fits:
        return f"{said} {_unranked(ranking)}"
    if best.name == carried.name:
        return said
    if not carried.finite:
        return f"{said} {_capital(carried.name)} is not finite on the held-out texts, so there is nothing to export."
    why = "; it needs code around the model, which no folder carries" if not best.exportable else ""
    return f"{said[:-1]}{why}. What a folder carries is {carried.name}{_closer(carried, ranking)}."


def _unranked(ranking: Ranking) -> str:
    if not _is_changed(ranking) and ranking.scaled_headroom >= 0:
        return _nothing_to_do(ranking.scaled_headroom)
    if ranking.scaled_headroom < 0:
        return (
            f"No exact scaling keeps the model finite in float16: {ranking.scaled_site} reaches "
            f"{number(ranking.scaled_peak)}, and the maximum is 65,504."
        )
    return f"The scaled model fits in float16, with {ranking.scaled_headroom:.1f} bits of headroom."


def _nothing_to_do(headroom: float | None) -> str:
    room = "" if headroom is None else f" with {headroom:.1f} bits of headroom"
    return f"{_FINITE_ANYWAY}{room}."


def _is_changed(ranking: Ranking) -> bool:
    return ranking.change.moved > 0 or bool(ranking.change.settings)


def how_scaled(ranking: Ranking) -> str | None:
    """What is multiplied, what that does to the largest value, and what it rounds; None where nothing changes."""
    if not _is_changed(ranking):
        return None
    change = ranking.change
    what = [f"{change.moved} of {counted(change.parameters, 'parameter')} by powers of two"]
    if change.residual is not None:
        what.append(f"the residual stream by {power(change.residual)}")
    what += [f"{key} by {power(round(math.log2(one.after / one.before)))}" for key, one in change.settings.items()]
    where = "" if ranking.scaled_site == ranking.site else f" in {ranking.scaled_site}"
    said = (
        f"The repair scales {listed(what)}: the largest value that float16 must store, {number(ranking.peak)} in "
        f"{ranking.site}, becomes {number(ranking.scaled_peak)}{where}. {_losses(change)}"
    )
    more = change.after.subnormal - change.before.subnormal, change.after.zero - change.before.zero
    if any(more):
        said += (
            f" In float16 {_more(more[0])} weights are subnormal, {change.after.subnormal:,} in all, and "
            f"{_more(more[1])} become zero."
        )
    if ranking.measured is not None:
        said += (
            " No prompt of any length can make it overflow in float16: that follows from its weights. Chosen by what "
            f"was measured, {ranking.measured.subnormal:,} weights would be subnormal."
        )
    return said


def in_the_way(ranking: Ranking) -> str | None:
    """Why there is no exact scaling that leaves the margin; None where there is one."""
    if not ranking.shortfall and not ranking.obstacles:
        return None
    said = (
        f"Of the {ranking.margin:g} bits of headroom asked for, {ranking.shortfall:.1f} cannot be had by an exact "
        "scaling."
    )
    return " ".join((said, *ranking.obstacles))


def in_float16(check: FolderCheck) -> str:
    """How a repaired folder runs in float16."""
    found = check.float16
    if found.failure is not None:
        return f"In float16 it does not run: {found.failure}"
    if not found.finite:
        return "In float16 it is not finite."
    return f"In float16 it is finite, and at most {found.error:.2g} away from float32."


def moved(scaling: Scaling) -> list[tuple[str, str]]:
    """The parameters that a scaling multiplies, those of all layers as one, and by which powers of two."""
    found: dict[str, list[int]] = {}
    for name, factor in scaling.parameters.items():
        found.setdefault(_NUMBERS.sub("*", name), []).extend(factor.exponents)
    return [(name, _powers(exponents)) for name, exponents in found.items()]


def power(exponent: int) -> str:
    """2^-3"""
    return f"2^{exponent}"


def _powers(exponents: Sequence[int]) -> str:
    low, high = min(exponents), max(exponents)
    return power(low) if low == high else f"{power(low)} to {power(high)}"


def _losses(change: Change) -> str:
    rounded = sum(change.gains_rounded.values())
    if change.approximate:
        return (
            f"It is approximate: what float32 returns changes by up to {change.approximate:.1g} of its largest "
            "magnitude."
        )
    if rounded:
        return f"Of the norms, {counted(rounded, 'gain')} had to be rounded in float32."
    return "Nothing is rounded in float32, where logits keep every bit."


def _more(count: int) -> str:
    return f"{count:,} more" if count >= 0 else f"{-count:,} fewer"


def outlier(score: Score) -> str | None:
    """Whether a single token makes up much of a mean; None where none does."""
    if not score.kl_mean or score.kl_max is None:
        return None
    part = score.kl_max / (score.kl_mean * score.positions)
    if part < 0.1:
        return None
    return (
        f"Of {score.name}'s mean KL one token among {score.positions:,} makes up {part:.0%}: there it is "
        f"{score.kl_max:.2g}."
    )


def _closer(score: Score, ranking: Ranking) -> str:
    """Beside bfloat16, which takes the same memory."""
    wide = next((other for other in ranking.scores if other.dtype == "bfloat16"), None)
    if wide is None or wide.name == score.name or not wide.kl_mean or not score.kl_mean:
        return ""
    ratio = wide.kl_mean / score.kl_mean
    if ratio < 1:
        return f", with {1 / ratio:,.1f} times bfloat16's mean KL"
    shown = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"
    return f", {shown} times as close as bfloat16" if math.isfinite(ratio) else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
