"""What becomes of cases, counted and drawn as bars, and how large their values are: figures of the claims."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from stabilitykit.formats import FLOAT16
from stabilitykit.report.blocks import Figure, Hover
from stabilitykit.report.outcomes import Outcome, reference
from stabilitykit.report.parts.bars import Part, stacked_bars
from stabilitykit.report.style import INK, limit_line, share
from stabilitykit.words import grouped, listed, with_bos

if TYPE_CHECKING:
    import matplotlib.figure

FINITE, SOME, RAISED, SILENT, HIDDEN, KILLED = (
    "finite",
    "breaks at some length",
    "an error is raised",
    "nothing is raised, logits are NaN",
    "a tensor breaks, logits are finite",
    "the process is killed",
)
"""What becomes of a case, in the words of a legend."""

OF_SHORTAGE = {"finite": FINITE, "not finite": SILENT, "raised": RAISED, "killed": KILLED}
"""The same, by a `Shortage`'s outcome."""


def _happened(outcome: Outcome) -> str:
    if outcome.first is None:
        return FINITE
    if outcome.case.kind == "lengths":
        return SOME
    if outcome.error is not None:
        return RAISED
    return HIDDEN if outcome.hidden else SILENT


def tally(found: Sequence[Outcome]) -> "list[tuple[str, Counter[str]]]":
    """One a dtype, <bos> and way of drawing tokens: how many cases came to what."""
    rows: dict[str, Counter[str]] = {}
    for outcome in found:
        greedy = outcome.case.kind == "run" and outcome.case.settings["temperature"] == 0
        name = f"{outcome.dtype} {with_bos(outcome.bos, mark='')}{', greedy' if greedy else ''}"
        rows.setdefault(name, Counter())[_happened(outcome)] += 1
    return list(rows.items())


CASES, SHARE = "cases", "memory allowed, as a share of what is needed"

Rows = Sequence[tuple[str, Mapping[str, float]]]
"""A bar's name, and how long it is for each thing that can become of a case."""


def bars(name: str, title: str, rows: Rows, *, unit: str = CASES) -> Figure:
    """One bar a row, in `unit`s: CASES, or SHARE with a line at the whole."""
    say = grouped if unit == CASES else share
    said = [f"{label}: {listed([f'{what} {say(value)}' for what, value in found.items()])}" for label, found in rows]
    return Figure(
        name=name,
        title=title,
        caption=f"Along the bars: {unit}.",
        alt=f"{'; '.join(said)}.",
        draw=partial(_draw_bars, rows=rows, unit=unit),
        size=(8.0, 1.0 + 0.3 * len(rows)),
    )


_LOOKS = {
    FINITE: (4, ""),
    SOME: (5, "---"),
    RAISED: (1, "xxx"),
    SILENT: (3, "////"),
    HIDDEN: (2, "...."),
    KILLED: (0, "\\\\\\\\"),
}


def _draw_bars(figure: "matplotlib.figure.Figure", *, rows: Rows, unit: str) -> list[Hover]:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    parts = [
        Part(name=what, values=[found.get(what, 0) for _, found in rows], colour=colour, hatch=hatch)
        for what, (colour, hatch) in _LOOKS.items()
    ]
    say = grouped if unit == CASES else share
    axes, hovers = stacked_bars(figure, [label for label, _ in rows], parts, say=say)
    if unit == CASES:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.axvline(1, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(unit)
    figure.legend(loc="outside upper right", ncols=3)
    return hovers


def largest_values(found: Sequence[Outcome]) -> Figure | None:
    """The largest value of each text, in the widest dtype that did not break, against what the formats hold."""
    found = [o for o in reference(found) if o.largest]
    if not found:
        return None
    names = [_text_name(o) for o in found]
    return Figure(
        name="claims-largest",
        title="The largest value of each text",
        caption=f"Largest magnitude of any stored tensor in {found[0].dtype}.",
        alt=f"One point a text, from {min(o.largest or 0 for o in found):,.0f} to "
        f"{max(o.largest or 0 for o in found):,.0f}; the float16 maximum is {FLOAT16.largest:,.0f}.",
        draw=partial(_draw_largest, names=names, values=[o.largest or 0.0 for o in found]),
        size=(8.0, 1.0 + 0.24 * len(found)),
    )


def _text_name(outcome: Outcome) -> str:
    prompt = str(outcome.case.settings["prompt"]).removeprefix("text: ")
    return f"{prompt[:32]}{'…' if len(prompt) > 32 else ''} {with_bos(outcome.bos, mark='')}".strip()


def _draw_largest(figure: "matplotlib.figure.Figure", *, names: Sequence[str], values: Sequence[float]) -> list[Hover]:
    from matplotlib.ticker import StrMethodFormatter

    axes = figure.subplots()
    axes.plot(values, range(len(names)), "o", color=INK, markersize=5)
    axes.set_xlim(0, 1.1 * max(*values, FLOAT16.largest))
    limit_line(axes, "float16", along="x")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("largest magnitude")
    left, right = axes.get_xlim()
    return [
        Hover(left=left, right=right, bottom=level - 0.5, top=level + 0.5, text=f"{name}: {value:,.0f}")
        for level, (name, value) in enumerate(zip(names, values, strict=True))
    ]
