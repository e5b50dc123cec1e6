"""What keeps the checkpoint finite in float16, side by side."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from stabilitykit.commands import line
from stabilitykit.diagnosis.remedies import how_scaled, in_float16, in_the_way, moved, outlier, recommendation
from stabilitykit.records.remedies import Ranking, Score
from stabilitykit.records.repaired_folder import FolderCheck
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.style import INK, bits, series_style, share, size
from stabilitykit.report.tables import table
from stabilitykit.words import code

if TYPE_CHECKING:
    import matplotlib.figure

KEY, TITLE = "remedies", "Remedies"

OPENING = (
    "Each remedy on texts that were not used to choose it, against the same tokens in float32. KL is the divergence of "
    "the remedy's next-token distribution from float32's, in nats a token; its interval is over means of 64 "
    "neighbouring tokens. Other texts may rank remedies that lie close together differently."
)


def section(results: Results) -> Section:
    """The ranking in the sweep's folder, if `stabilitykit repair --report` has put one there."""
    ranking = results.ranking
    if ranking is None:
        command = code(line("repair", results.plan.checkpoint, "--report", results.folder))
        opening = f"No remedies have been ranked. {command}, with this report's folder, ranks them and adds them here."
        return Section(key=KEY, title=TITLE, opening=opening)
    found = blocks(ranking)
    drawn = [score for score in ranking.scores if score.finite and score.kl_mean and score.kl_p99]
    if drawn:
        found.append(_figure(drawn))
    if ranking.scaling.parameters:
        found.append(_scaled(ranking))
    if ranking.islands:
        found.append(_islands(ranking))
    if ranking.command:
        found.append(Prose(f"To rank them again: {code(ranking.command)}"))
    return Section(key=KEY, title=TITLE, opening=OPENING, blocks=found)


def blocks(ranking: Ranking) -> list[Block]:
    """Which remedy to take, what the scaling does and what stands in its way; the remedies, best first."""
    score = ranking.repaired
    said = how_scaled(ranking), in_the_way(ranking), None if score is None else outlier(score)
    more = [text for text in said if text is not None]
    is_finite = ranking.scaled_headroom >= 0 if score is None else score.finite
    found: list[Block] = [Prose(recommendation(ranking), tone="good" if is_finite else "bad")]
    if more:
        found.append(Prose(" ".join(more)))
    if ranking.scores:
        found += of_scores(ranking.scores)
    if ranking.left_out:
        found.append(_left_out(ranking))
    return found


_COLUMNS: Sequence[tuple[Column, Callable[[Score], Any]]] = [
    (Column("remedy"), lambda one: one.name),
    (Column("mean KL", format=lambda value: _short(value)), lambda one: one.kl_mean if one.finite else None),
    (Column("±", format=lambda value: _short(value)), lambda one: one.kl_interval if one.finite else None),
    (Column("99%", format=lambda value: _short(value)), lambda one: one.kl_p99 if one.finite else None),
    (Column("largest", format=lambda value: _short(value)), lambda one: one.kl_max if one.finite else None),
    (Column("top-1", format=share), lambda one: one.top1 if one.finite else None),
    (
        Column("perplexity", format=lambda value: f"{100 * value:+.3f}%"),
        lambda one: one.perplexity if one.finite else None,
    ),
    (Column("error", format=lambda value: _short(value)), lambda one: one.error if one.finite else None),
    (Column("headroom", unit="bits", format=bits), lambda one: one.headroom if one.finite else None),
    (Column("weights", unit="bytes", format=size), lambda one: one.weights),
    (Column("extra", unit="bytes", format=size), lambda one: one.extra),
    (Column("time", format=lambda value: f"{value:.2f}×"), lambda one: one.time),
]


def _note(*, is_kl: bool) -> str:
    kl = (
        "KL: mean, half the width of its 95% interval, 99th percentile, largest. Top-1: positions with float32's "
        "likeliest token."
    )
    error = "Error: the largest difference from what float32 returns, in parts of the largest magnitude of that."
    return (
        f"{kl if is_kl else error} Headroom: bits between the largest value stored and the dtype's maximum. Extra: "
        "what a window of tokens takes on top of a plain run. Time: against plain float16, on one machine and with the "
        "kit's own code around the model. A dash: not finite."
    )


def of_scores(scores: Sequence[Score]) -> list[Block]:
    """The remedies in figures, then what each of them does."""
    far = [one.kl_mean for one in scores if one.kl_mean is not None]
    known = [column for column in _COLUMNS if any(column[1](one) is not None for one in scores)]
    known = [column for column in known if not (far and column[0].name == "error")]  # KL says it better
    measured = table(
        "remedies",
        f"Against float32, over {scores[0].positions:,} held-out {'tokens' if far else 'rows'}",
        scores,
        known,
        note=_note(is_kl=bool(far)),
        alarming=lambda one: not one.finite,
    )
    said = table(
        "remedies-explained",
        "What each remedy does",
        scores,
        [
            (Column("remedy"), lambda one: one.name),
            (Column("a folder can carry it"), lambda one: one.exportable),
            (Column("what it does"), lambda one: one.summary),
        ],
        note="What no folder of weights can carry needs code around the model.",
    )
    return [measured, said]


def of_check(check: FolderCheck) -> list[Block]:
    """What a repaired folder was compared with, and how it runs in float16."""
    compared = table(
        "comparisons",
        "Numbers that have to be equal, bit by bit",
        check.comparisons,
        [
            (Column("what"), lambda one: one.what),
            (Column("numbers"), lambda one: one.numbers),
            (Column("different"), lambda one: one.different),
            (Column("by up to", format=_short), lambda one: one.largest if one.different else None),
        ],
        alarming=lambda one: not one.equal,
    )
    said = [in_float16(check)]
    if not check.original_seen:
        said.insert(0, "The original was not seen: compared with the folder itself, its scaling undone.")
    return [Prose(" ".join(said)), compared]


def _left_out(ranking: Ranking) -> Table:
    return table(
        "remedies-left-out",
        "Remedies that do not apply",
        list(ranking.left_out.items()),
        [(Column("remedy"), lambda one: one[0]), (Column("why"), lambda one: one[1])],
    )


def _scaled(ranking: Ranking) -> Table:
    return table(
        "scaled",
        "What the scaling multiplies",
        moved(ranking.scaling),
        [(Column("parameter"), lambda one: one[0]), (Column("times"), lambda one: one[1])],
        note="A star stands for the numbers of layers. Of a norm it is the gain that is multiplied.",
    )


def _islands(ranking: Ranking) -> Table:
    return table(
        "islands",
        "Tensors that overflow float16 in the texts that the islands were chosen from",
        ranking.islands,
        [(Column("tensor"), lambda site: site)],
        note="Each of them alone makes float16 overflow; with all of them kept in float32 nothing overflows.",
    )


def _short(value: float) -> str:
    """4.8e-5"""
    return re.sub(r"e([-+])0?", r"e\1", f"{value:.1e}") if value else "0"


def _figure(scores: Sequence[Score]) -> Figure:
    return Figure(
        name="kl-and-memory",
        title="KL to float32, and memory",
        caption="Filled: the mean over all tokens, with its 95% interval; hollow: the 99th percentile. Beside the name "
        "is the memory of the weights and of what a window of tokens takes on top of a plain run. Not drawn: remedies "
        "that are not finite.",
        alt="; ".join(f"{one.name}: mean {one.kl_mean:.2g}, {size(one.weights + one.extra)}" for one in scores),
        draw=partial(_draw, scores=scores),
        size=(8.0, 1.1 + 0.34 * len(scores)),
    )


def _draw(figure: "matplotlib.figure.Figure", scores: Sequence[Score]) -> list[Hover]:
    axes = figure.subplots()
    axes.set_xscale("log")
    hovers = []
    for level, one in enumerate(scores):
        mean, interval, p99 = one.kl_mean or 0.0, one.kl_interval or 0.0, one.kl_p99 or 0.0
        look = series_style(0 if one.exportable else 1) | {"linestyle": "", "marker": "o"}
        first = level == 0 or all(other.exportable != one.exportable for other in scores[:level])
        label = "a folder can carry it" if one.exportable else "needs code around the model"
        low = max(mean - interval, mean / 20)
        axes.plot([low, mean + interval], [level, level], color=INK, linewidth=1)
        axes.plot(mean, level, **look, markersize=7, label=label if first else None)
        axes.plot(p99, level, **look, markersize=6, fillstyle="none")
        text = f"{one.name}: mean KL {mean:.2g} ± {interval:.1g}, 99% below {p99:.2g}, {size(one.weights + one.extra)}"
        hovers.append(Hover(left=low, right=p99, bottom=level - 0.4, top=level + 0.4, text=text))
    axes.set_yticks(range(len(scores)), [f"{one.name}, {size(one.weights + one.extra)}" for one in scores])
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xlabel("KL divergence from float32 [nats a token]")
    figure.legend(loc="outside upper right", ncols=2)
    return hovers
