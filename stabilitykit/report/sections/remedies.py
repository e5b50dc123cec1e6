"""What keeps the checkpoint finite in float16, side by side."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from stabilitykit.diagnosis.remedies import how_rescaled, outlier, recommendation
from stabilitykit.records.remedies import Ranking, Score
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Cell, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.style import INK, bits, series_style, share, size
from stabilitykit.words import code

if TYPE_CHECKING:
    import matplotlib.figure

KEY, TITLE = "remedies", "Remedies"

OPENING = (
    "Each remedy on texts that chose nothing of it, against the same tokens in float32. KL is that of float32's "
    "next-token distribution from the remedy's, in nats a token; its interval is over means of 64 neighbouring tokens."
)


def section(results: Results) -> Section:
    """The ranking in the sweep's folder, if `stabilitykit repair --report` has put one there."""
    ranking = results.ranking
    if ranking is None:
        command = code(f"stabilitykit repair {results.plan.checkpoint} --report FOLDER")
        opening = f"No remedies were ranked. {command}, with this report's folder, ranks them and adds them here."
        return Section(key=KEY, title=TITLE, opening=opening)
    best = outlier(ranking.repaired)
    said = [recommendation(ranking), how_rescaled(ranking), best]
    blocks: list[Block] = [Prose(" ".join(text for text in said if text is not None))]
    drawn = [score for score in ranking.scores if score.finite and score.kl_mean and score.kl_p99]
    if drawn:
        blocks.append(_figure(drawn))
    blocks.append(_table(ranking))
    blocks += [Prose(f"**{score.name}**: {score.summary}") for score in ranking.scores]
    if ranking.islands:
        blocks.append(_islands(ranking))
    if ranking.command:
        blocks.append(Prose(f"To rank them again: {code(ranking.command)}"))
    return Section(key=KEY, title=TITLE, opening=OPENING, blocks=blocks)


def _table(ranking: Ranking) -> Table:
    return Table(
        name="remedies",
        title=f"Remedies over {ranking.scores[0].positions:,} held-out tokens, best first",
        columns=[
            Column(name="remedy"),
            Column(name="finite"),
            Column(name="a folder can carry it"),
            Column(name="mean KL", format=_short),
            Column(name="± 95%", format=_short),
            Column(name="99th percentile", format=_short),
            Column(name="largest", format=_short),
            Column(name="same likeliest token", format=share),
            Column(name="perplexity", format=lambda value: f"{100 * value:+.3f}%"),
            Column(name="least headroom", unit="bits", format=bits),
            Column(name="weights", unit="bytes", format=size),
            Column(name="extra", unit="bytes", format=size),
            Column(name="time ÷ float16", format=lambda value: f"{value:.2f}"),
        ],
        rows=[_row(score) for score in ranking.scores],
        note="A dash: not finite. Extra is what a window of tokens takes beside a plain run. Times are one machine's, "
        "and of the kit's own code around the model.",
    )


def _row(score: Score) -> list[Cell]:
    found: list[Cell] = [score.kl_mean, score.kl_interval, score.kl_p99, score.kl_max]
    found += [score.top1, score.perplexity, score.headroom]
    known = found if score.finite else [None] * len(found)
    return [score.name, score.finite, score.exportable, *known, score.weights, score.extra, score.time]


def _islands(ranking: Ranking) -> Table:
    return Table(
        name="islands",
        title="What float16 cannot hold on the choosing texts",
        columns=[Column(name="tensor")],
        rows=[[site] for site in ranking.islands],
        note="Each alone breaks float16, and all together kept in float32 leave nothing that does.",
    )


def _short(value: float) -> str:
    return f"{value:.2g}"


def _figure(scores: Sequence[Score]) -> Figure:
    return Figure(
        name="kl-and-memory",
        title="KL to float32, and memory",
        caption="Filled: the mean over all tokens, with its 95% interval; hollow: the 99th percentile. Beside the name "
        "is the memory of the weights and of what a window of tokens takes beside a plain run: all remedies take that "
        "of 16 bits, so that they differ in the other direction alone. Not drawn: what is not finite.",
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
