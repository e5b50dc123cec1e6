"""What a ranking of remedies comes to, in sentences."""

import math

from stabilitykit.records.remedies import Ranking, Score
from stabilitykit.words import counted, number

_FINITE_ANYWAY = "Nothing has to be changed: all values that were seen fit in float16"


def recommendation(ranking: Ranking) -> str:
    """Which remedy is best and why, and which one a folder carries."""
    best, carried = ranking.scores[0], ranking.repaired
    if not best.finite:
        return "No remedy keeps the held-out texts finite."
    if ranking.gamma == 1 and carried.finite and not ranking.proved:
        room = "" if carried.headroom is None else f" with {carried.headroom:.1f} bits of headroom"
        return f"{_FINITE_ANYWAY}{room}."
    said = f"Closest to float32 is {best.name}{_closer(best, ranking)}."
    if best.name == carried.name:
        return said
    if not carried.finite:
        return f"{said} {_capital(carried.name)} is not finite on the held-out texts, so there is nothing to export."
    why = "; it needs code around the model, which no folder carries" if not best.exportable else ""
    return f"{said[:-1]}{why}. What a folder carries is {carried.name}{_closer(carried, ranking)}."


def how_rescaled(ranking: Ranking) -> str | None:
    """Which γ was chosen, from what, and what it rounds; None where nothing has to be changed."""
    if ranking.gamma == 1 and all(beta == 1 for beta in ranking.inner):
        return None
    rounded = sum(ranking.gains_rounded.values())
    losses = (
        f"Of the norms, {counted(rounded, 'gain')} had to be rounded in float32."
        if rounded
        else "Nothing is rounded in float32, where logits keep every bit."
    )
    proved = ""
    if ranking.measured is not None:
        beside = ""
        if any(beta != 1 for beta in ranking.inner):
            beside = f", with gate · up by {min(ranking.inner):g} to {max(ranking.inner):g} from layer to layer"
        proved = (
            f" No prompt of any length can make it overflow in float16: that follows from its weights{beside}. "
            f"Chosen by what was measured, {ranking.measured.subnormal:,} weights would be subnormal."
        )
    more = ranking.after.subnormal - ranking.before.subnormal, ranking.after.zero - ranking.before.zero
    small = (
        f" In float16 {more[0]:,} more weights are subnormal, {ranking.after.subnormal:,} in all, and {more[1]:,} more "
        "become zero."
        if any(more)
        else ""
    )
    return (
        f"Rescaled by {ranking.gamma:g}, the largest value that float16 must store, {number(ranking.peak)} in "
        f"{ranking.site}, becomes {number(ranking.peak * ranking.gamma)}. {losses}{small}{proved}"
    )


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
