"""How far the low precisions are from float32, inside the model and at its end."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stabilitykit.formats import number_format
from stabilitykit.records import LogitsError, Record, Recording
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Cell, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.parts import choose, lines, places, precision
from stabilitykit.report.parts.choose import Group
from stabilitykit.report.parts.lines import RESIDUAL, Panels, Point
from stabilitykit.report.style import decibel, dtype_style, magnitude_axis, share
from stabilitykit.report.tables import table
from stabilitykit.words import counted, number, place

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

KEY, TITLE = "error", "Error against float32"

OPENING = (
    "How far each dtype is from the same prompt in float32: inside the model as SQNR, the power of the signal over "
    "that of the error, where 6 dB are one bit and more is better; at its end as what the error does to the next "
    "token's distribution. SQNR speaks of the elements that hold the power, so where a few massive ones do, all others "
    "may be far off and it does not show; and a run that broke is compared only up to its break."
)

_SUBLAYERS = (places.ATTENTION_ADDS, places.MLP_ADDS)
_PER_BIT = 20 * math.log10(2)  # dB


def section(results: Results) -> Section:
    """SQNR by layer and the logits' errors of the chosen groups, and the logits' errors of every run in a table."""
    blocks: list[Block] = []
    every = choose.groups(results)
    drawn = [group for group in choose.chosen(results) if any(map(_compared, group.low.values()))]
    if not any(_compared(run) for group in every for run in group.low.values()):
        return choose.nothing(KEY, TITLE, results, what="a comparison with float32")
    for group in drawn:
        blocks.append(Prose(" ".join(_sentences(group))))
        if any(points for panel in _panels(group).values() for points in panel.values()):
            blocks += [_figure(group), _by_layer(group)]
    if any(_logits(run) for group in drawn for run in group.low.values()):
        blocks.append(_logits_figure(drawn))
    blocks.append(_table(every))
    return Section(key=KEY, title=TITLE, opening=choose.opening(results, OPENING), blocks=blocks)


def _compared(recording: Recording) -> bool:
    return recording.header.logits_error is not None or any(record.deviation is not None for record in recording)


def _logits(recording: Recording) -> LogitsError | None:
    """The error of the logits; None for a run that broke: what is left of its logits is no measure of the dtype."""
    error = recording.header.logits_error
    broke = choose.first_break(recording) is not None
    return None if error is None or error.kl_mean is None or broke else error


def _sentences(group: Group) -> Iterator[str]:
    yield f"**{group.name}**:"
    for dtype, recording in group.low.items():
        error, broke = _logits(recording), choose.break_sentence(recording)
        if not _compared(recording):
            yield f"the {dtype} run was not compared with float32."
        elif broke is not None:
            yield f"{broke}; its logits say nothing of its precision."
        elif error is not None and error.kl_mean is not None and error.top1 is not None:
            yield (
                f"{dtype}'s next-token distribution is {number(error.kl_mean)} nats of KL from float32's on average "
                f"and {number(error.kl_max)} at most, with the same likeliest token at {share(error.top1)} of "
                f"{counted(error.compared, 'position')}."
            )
        else:
            yield f"no logits of the {dtype} run could be compared."


def _panels(group: Group) -> Panels:
    """By panel and dtype the SQNR by layer."""
    return lines.panels(group.low, _SUBLAYERS, _point)


def _point(x: float, record: Record) -> Point | None:
    level = precision.sqnr(record)
    if level is None or record.deviation is None:
        return None
    ulp = "" if record.deviation.largest_ulp is None else f", largest error {number(record.deviation.largest_ulp)} ulp"
    value = f"{decibel(level)} dB" if math.isfinite(level) else "no error"
    return Point(x=x, y=level, text=f"{value} in {place(record)}{ulp}")


def _once(dtype: str) -> float:
    """The least SQNR of a tensor of normal numbers that is rounded to the format once, in dB."""
    return _PER_BIT * number_format(dtype).precision


def _figure(group: Group) -> Figure:
    panels, broken = _panels(group), choose.breaks(group)
    last = [
        f"{dtype} ends at {decibel(points[-1].y)} dB in the residual stream"
        for dtype, points in panels[RESIDUAL].items()
        if points and math.isfinite(points[-1].y)
    ]
    shown = [dtype for dtype in group.low if any(panel[dtype] for panel in panels.values())]
    once = ", ".join(f"{decibel(_once(dtype))} dB in {dtype}" for dtype in shown)
    return Figure(
        name=f"error-{group.slug}",
        title=f"SQNR by layer: {group.name}",
        caption=(
            "In the residual stream a whole layer number is after attention, half a step on is after the MLP. Dotted: "
            f"what rounding once costs at most, which leaves {once}."
            + (f" A line ends where its run broke: {'; '.join(broken)}." if broken else "")
        ),
        alt=f"Lines of SQNR over layers for {', '.join(shown)}. {'; '.join(last)}.",
        draw=functools.partial(_draw, group=group),
        size=(8.0, 3.6),
    )


def _draw(figure: "matplotlib.figure.Figure", group: Group) -> Sequence[Hover]:
    panels = _panels(group)
    shown = [name for name in panels if any(panels[name].values())]
    layers = math.floor(max(p.x for panel in panels.values() for points in panel.values() for p in points)) + 1
    grid = figure.add_gridspec(1, len(shown), width_ratios=[1.6 if name == RESIDUAL else 1 for name in shown])
    parts: dict[str, Axes] = {}
    for turn, name in enumerate(shown):
        axes = figure.add_subplot(grid[turn], sharey=parts[shown[0]] if turn else None)
        parts[name] = axes
        lines.plot(axes, panels[name])
        for dtype in group.low:
            if any(panel[dtype] for panel in panels.values()):
                axes.axhline(_once(dtype), color=dtype_style(dtype)["color"], linewidth=1.0, linestyle=(0, (1, 1.5)))
        lines.layer_axis(axes, layers)
        axes.set_title(name)
        axes.tick_params(labelleft=turn == 0)
    parts[shown[0]].set_ylabel("SQNR [dB]")
    lines.legend(figure)
    return [
        hover
        for name, axes in parts.items()
        for hover in lines.hovers(axes, panels[name], step=0.5 if name == RESIDUAL else 1.0)
    ]


def _logits_figure(groups: Sequence[Group]) -> Figure:
    rows = [
        (group, dtype, error)
        for group in groups
        for dtype, recording in group.low.items()
        if (error := _logits(recording)) is not None
    ]
    said = [
        f"{dtype}, {group.name}: mean {number(error.kl_mean)}, most {number(error.kl_max)}"
        for group, dtype, error in rows
    ]
    return Figure(
        name="error-logits",
        title="KL divergence of the next-token distribution from float32's",
        caption=(
            "Filled: the mean over positions; hollow: the largest. A run that broke has none. Values of 0 or below, "
            "which rounding can leave, are at the left edge."
        ),
        alt=f"Points on a logarithmic scale, in nats. {'; '.join(said)}.",
        draw=functools.partial(_draw_logits, rows=rows),
        size=(8.0, 1.1 + 0.4 * len(rows)),
    )


def _draw_logits(figure: "matplotlib.figure.Figure", rows: Sequence[tuple[Group, str, LogitsError]]) -> Sequence[Hover]:
    axes = figure.add_subplot()
    values = [value for _, _, error in rows for value in (error.kl_mean, error.kl_max) if value and value > 0]
    edge = min(values, default=1e-6) / 3
    magnitude_axis(axes, "x")
    hovers = []
    for row, (_, dtype, error) in enumerate(rows):
        mean, most = (max(value or 0.0, edge) for value in (error.kl_mean, error.kl_max))
        look = {"color": dtype_style(dtype)["color"], "marker": dtype_style(dtype)["marker"], "markersize": 7}
        axes.plot([mean, most], [row, row], color=look["color"], linewidth=1.0)
        axes.plot(mean, row, **look)
        axes.plot(most, row, **look, fillstyle="none")
        text = (
            f"{dtype}: KL {number(error.kl_mean)} nats on average, {number(error.kl_max)} at most; same likeliest "
            f"token at {share(error.top1 or 0.0)} of {counted(error.compared, 'position')}"
        )
        hovers.append((row, text))
    axes.set_xlim(edge, max(values, default=1e-6) * 3)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [f"{dtype}: {group.name}" for group, dtype, _ in rows])
    axes.set_xlabel("KL divergence from float32 [nats a token]")
    left, right = axes.get_xlim()
    return [Hover(left=left, right=right, bottom=row - 0.5, top=row + 0.5, text=text) for row, text in hovers]


def _by_layer(group: Group) -> Table:
    panels = _panels(group)
    values = {
        (name, dtype): {point.x: point.y for point in points}
        for name, panel in panels.items()
        for dtype, points in panel.items()
        if points
    }
    layers = sorted({math.floor(x) for found in values.values() for x in found})
    shift = {RESIDUAL: 0.5}
    columns: list[tuple[Column, Callable[[int], Cell]]] = [(Column("layer"), lambda layer: layer)]
    for (name, dtype), found in values.items():
        heading = f"{places.AFTER_MLP if name == RESIDUAL else name}, {dtype}"
        of = functools.partial(_at, found, shift.get(name, 0.0))
        columns.append((Column(heading, unit="dB", format=decibel), of))
    return table(
        f"error-by-layer-{group.slug}",
        f"SQNR by layer: {group.name}",
        layers,
        columns,
        note="inf: no error at all. A dash: not compared, or after the break.",
    )


def _at(found: Mapping[float, float], shift: float, layer: int) -> float | None:
    return found.get(layer + shift)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A run in a low precision; `error` is None where it broke or was not compared."""

    name: str
    dtype: str
    sqnr: float | None
    error: LogitsError | None
    first: Record | None


def _run(group: Group, dtype: str) -> _Run:
    recording = group.low[dtype]
    logits = [record for record in choose.intact(recording) if record.label == "logits"]
    return _Run(
        name=group.name,
        dtype=dtype,
        sqnr=precision.sqnr(logits[-1]) if logits else None,
        error=_logits(recording),
        first=choose.first_break(recording),
    )


def _table(groups: Sequence[Group]) -> Table:
    return table(
        "error",
        "Logits against float32, in every run",
        [_run(group, dtype) for group in groups for dtype in group.low],
        [
            (Column("run"), lambda run: run.name),
            (Column("dtype"), lambda run: run.dtype),
            (Column("SQNR of the logits", unit="dB", format=decibel), lambda run: run.sqnr),
            (Column("mean KL", unit="nats"), lambda run: None if run.error is None else run.error.kl_mean),
            (Column("largest KL", unit="nats"), lambda run: None if run.error is None else run.error.kl_max),
            (Column("same likeliest token", format=share), lambda run: None if run.error is None else run.error.top1),
            (Column("positions compared"), lambda run: None if run.error is None else run.error.compared),
            (Column("positions"), lambda run: None if run.error is None else run.error.positions),
            (Column("first break"), lambda run: None if run.first is None else place(run.first)),
        ],
        note="A run that broke, or was not compared, has no errors. Where few positions were compared, the share of "
        "equal tokens is coarse.",
    )
