"""The largest magnitudes, layer by layer, against the formats' limits."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stabilitykit.diagnosis.layers import peak, stored
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records import Record
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Cell, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.parts import choose, lines, places
from stabilitykit.report.parts.choose import Group
from stabilitykit.report.parts.lines import RESIDUAL, Panels, Point
from stabilitykit.report.style import bits, dtype_style, limit_line, magnitude_axis
from stabilitykit.report.tables import table
from stabilitykit.words import at_token, number, place

if TYPE_CHECKING:
    import matplotlib.figure

KEY, TITLE = "peaks", "Peaks by layer"

OPENING = (
    "The largest magnitude in the residual stream, in what attention and MLP add to it, and in the largest tensors "
    "inside them, in each layer. A peak close to a format's maximum means that another prompt may exceed it; and a "
    "peak is one element, which says nothing of the size of all others."
)

_OUTSIDE = "outside"
_SUBLAYERS = (places.ATTENTION_ADDS, places.MLP_ADDS, places.GATE_UP, places.SCORES)
_TOO_CLOSE = 2.0  # two limits within this factor are one line to the eye


def section(results: Results) -> Section:
    """Peaks of the chosen groups as figures and by layer, and those of every finished run in one table."""
    drawn = [group for group in choose.chosen(results) if _layers(group)]
    if not drawn:
        return choose.nothing(KEY, TITLE, results, what="a labelled layer")
    blocks: list[Block] = []
    for group in drawn:
        blocks += [Prose(" ".join(_sentences(group))), _figure(group), _by_layer(group)]
    blocks.append(_all_runs(choose.groups(results)))
    return Section(key=KEY, title=TITLE, opening=choose.opening(results, OPENING), blocks=blocks)


def _sentences(group: Group) -> Iterator[str]:
    yield f"**{group.name}**:"
    top = peak(r for r in choose.intact(group.widest) if r.label in places.RESIDUAL)
    if top is not None and top.amax is not None:
        room = group.form.headroom(top.amax)
        side = "below" if room >= 0 else "above"
        until = "" if choose.first_break(group.widest) is None else ", before its break,"
        yield (
            f"in {group.widest.header.dtype}{until} the residual stream reaches {number(top.amax)} "
            f"({place(top)}{at_token(top.amax_position, top.amax_token_text)}), {bits(abs(room))} bits "
            f"{side} the {group.form.name} maximum."
        )
    yield from (f"{sentence}." for sentence in choose.breaks(group))


def _panels(group: Group) -> Panels:
    """By panel and dtype the peaks from before the run's first break."""
    found = lines.panels(group.runs, _SUBLAYERS, _point) | {_OUTSIDE: {}}
    for dtype, recording in group.runs.items():
        records = list(choose.intact(recording))
        ends = ((x, r) for x, label in enumerate(places.OUTSIDE) for r in records if r.label == label)
        found[_OUTSIDE][dtype] = list(filter(None, (_point(x, r) for x, r in ends)))
    return found


def _point(x: float, record: Record) -> Point | None:
    if not record.amax:
        return None  # nothing finite, or nothing but zeros, which no logarithmic scale has
    where = at_token(record.amax_position, record.amax_token_text)
    return Point(x=x, y=record.amax, text=f"{number(record.amax)} in {place(record)}{where}")


def _breaks(group: Group) -> Panels:
    """By panel and dtype where the run broke, at the value that did not fit."""
    found: Panels = {}
    for dtype, recording in group.runs.items():
        first = choose.first_break(recording)
        if first is None or first.broke is None or first.layer is None:
            continue
        names = {label: name for name, label in places.sublayers(recording).items()}
        panel = RESIDUAL if first.label in places.RESIDUAL else names.get(first.label or "")
        if panel is not None:
            value = abs(first.broke.value) if first.broke.value is not None else math.nan
            height = value if math.isfinite(value) else first.broke.limit
            x = first.layer + (0.5 if first.label == places.AFTER_MLP else 0.0)
            text = f"{number(first.broke.value)} in {place(first)}, above the maximum, {number(first.broke.limit)}"
            found.setdefault(panel, {})[f"{dtype} breaks"] = [Point(x=x, y=height, text=text)]
    return found


def _limits(group: Group) -> tuple[list[str], list[str]]:
    """The formats whose limits are drawn, and those left out: far above every peak, or too close to another."""
    heights = [point.y for panel in _panels(group).values() for points in panel.values() for point in points]
    drawn: list[str] = []
    left: list[str] = []
    for name in dict.fromkeys([*group.runs, group.form.name, *group.widest.header.formats]):
        largest = number_format(name).largest
        clear = all(not 1 / _TOO_CLOSE < largest / number_format(other).largest < _TOO_CLOSE for other in drawn)
        visible = largest <= max([*heights, group.form.largest])
        (drawn if clear and visible else left).append(name)
    return drawn, left


def _layers(group: Group) -> int:
    """How many layers have a residual stream to show."""
    labelled = [r.layer for run in group.runs.values() for r in run if r.label in places.RESIDUAL]
    return max((layer for layer in labelled if layer is not None), default=-1) + 1


def _figure(group: Group) -> Figure:
    panels, broken = _panels(group), choose.breaks(group)
    peaks = {dtype: max((point.y for point in points), default=0.0) for dtype, points in panels[RESIDUAL].items()}
    _, left = _limits(group)
    beyond = "; ".join(f"{name}, {number(number_format(name).largest)}" for name in left)
    absent = [name for name in _SUBLAYERS if not any(panels[name].values())]
    return Figure(
        name=f"peaks-{group.slug}",
        title=f"Peaks by layer: {group.name}",
        caption="".join(
            (
                "In the residual stream a whole layer number is after attention, half a step on is after the MLP. ",
                f"A line ends where its run broke, × is the value that did not fit: {'; '.join(broken)}."
                if broken
                else "No run broke.",
                f" Maxima not drawn, far above or close to another: {beyond}." if beyond else "",
                f" Not recorded: {', '.join(absent)}." if absent else "",
            )
        ),
        alt=(
            "Lines over layers on a logarithmic scale. The residual stream's peak before any break: "
            f"{', '.join(f'{number(value)} in {dtype}' for dtype, value in peaks.items())}. "
            f"The {group.form.name} maximum is {number(group.form.largest)}."
        ),
        draw=functools.partial(_draw, group=group),
        size=(8.0, 6.0),
    )


def _draw(figure: "matplotlib.figure.Figure", group: Group) -> Sequence[Hover]:
    panels, breaks = _panels(group), _breaks(group)
    shown = [name for name in _SUBLAYERS if any(panels[name].values())]
    grid = figure.add_gridspec(2 if shown else 1, 12, height_ratios=[3, 2] if shown else None)
    main = figure.add_subplot(grid[0, :9])
    axes = {RESIDUAL: main, _OUTSIDE: figure.add_subplot(grid[0, 9:], sharey=main)}
    width = 12 // max(len(shown), 1)
    for turn, name in enumerate(shown):
        axes[name] = figure.add_subplot(grid[1, turn * width : (turn + 1) * width], sharey=main)

    magnitude_axis(main)
    heights = [p.y for part in (panels, breaks) for panel in part.values() for points in panel.values() for p in points]
    drawn, _ = _limits(group)
    maxima = [number_format(limit).largest for limit in drawn]
    main.set_ylim(min([*heights, *maxima]) / 2, max([*heights, group.form.largest]) * 4)
    for name, part in axes.items():
        lines.plot(part, panels[name], joined=name != _OUTSIDE)
        for said, points in breaks.get(name, {}).items():
            colour = dtype_style(said.removesuffix(" breaks"))["color"]
            part.plot([p.x for p in points], [p.y for p in points], "X", color=colour, markersize=9, label=said)
        for limit in drawn:
            if name == _OUTSIDE:  # with the fewest points under a name
                limit_line(part, limit)
            else:
                line = {"color": dtype_style(limit)["color"], "linestyle": (0, (1, 1.5)), "linewidth": 1.0}
                part.axhline(number_format(limit).largest, **line)
        first = name in (RESIDUAL, *shown[:1])
        part.tick_params(labelleft=first)
        part.set_ylabel("largest magnitude" if first else "")
        part.set_title(name)
        if name == _OUTSIDE:
            part.set_xticks(range(len(places.OUTSIDE)), ["embed-\nding", "final\nnorm", "logits"])
            part.set_xlim(-0.6, len(places.OUTSIDE) - 0.4)
        else:
            lines.layer_axis(part, _layers(group))
    lines.legend(figure)
    return [
        hover
        for name, part in axes.items()
        for hover in lines.hovers(part, panels[name], breaks.get(name, {}), step=0.5 if name == RESIDUAL else 1.0)
    ]


def _by_layer(group: Group) -> Table:
    widest = group.widest
    records = {dtype: list(choose.intact(run)) for dtype, run in group.runs.items()}
    residual = {dtype: [places.at(intact, label) for label in places.RESIDUAL] for dtype, intact in records.items()}
    sublayers = {
        name: places.at(records[widest.header.dtype], label) for name, label in places.sublayers(widest).items()
    }
    rows: list[list[Cell]] = []
    for layer in range(_layers(group)):
        peaks = [peak(half[layer] for half in halves if layer in half) for halves in residual.values()]
        parts = [found.get(layer) for found in sublayers.values()]
        rows.append([layer, *(None if record is None else record.amax for record in (*peaks, *parts))])
    return Table(
        name=f"peaks-by-layer-{group.slug}",
        title=f"Peaks by layer: {group.name}",
        columns=[
            Column("layer"),
            *(Column(f"residual, {dtype}") for dtype in residual),
            *(Column(f"{name}, {widest.header.dtype}") for name in sublayers),
        ],
        rows=rows,
        note="Residual: the larger of after attention and after the MLP. A dash: not recorded, or after the break.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peak:
    """The largest stored value of a run from before its first break; None where nothing finite was stored."""

    group: Group
    dtype: str
    top: Record | None
    amax: float | None
    norm: float | None
    first: Record | None


def _peak(group: Group, dtype: str) -> _Peak:
    recording = group.runs[dtype]
    records = list(choose.intact(recording))
    kept = {id(record) for record in stored(recording)}
    top = peak(record for record in records if id(record) in kept)
    norm = peak(record for record in records if record.label == "final norm")
    return _Peak(
        group=group,
        dtype=dtype,
        top=top,
        amax=None if top is None else top.amax,
        norm=None if norm is None else norm.amax,
        first=choose.first_break(recording),
    )


def _headroom(run: _Peak, form: NumberFormat) -> float | None:
    return None if run.amax is None else form.headroom(run.amax)


def _all_runs(groups: Sequence[Group]) -> Table:
    form = groups[0].form
    return table(
        "peaks",
        "Largest magnitude of every run before it breaks",
        [_peak(group, dtype) for group in groups for dtype in group.runs],
        [
            (Column("run"), lambda run: run.group.name),
            (Column("dtype"), lambda run: run.dtype),
            (Column("peak"), lambda run: run.amax),
            (Column("where"), lambda run: None if run.top is None else place(run.top)),
            (Column("position"), lambda run: None if run.top is None else run.top.amax_position),
            (Column("token"), lambda run: None if run.top is None else run.top.amax_token_text),
            (Column("headroom", unit="bits", format=bits), lambda run: _headroom(run, number_format(run.dtype))),
            (Column(f"headroom in {form.name}", unit="bits", format=bits), lambda run: _headroom(run, form)),
            (Column("final norm"), lambda run: run.norm),
            (Column("first break"), lambda run: None if run.first is None else place(run.first)),
        ],
        note="Over tensors stored in the run's dtype, from before its first break. Headroom is that of the peak.",
    )
