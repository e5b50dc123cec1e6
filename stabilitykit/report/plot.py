"""A recording drawn on matplotlib's axes, for a notebook: headroom by layer, by layer and site, exponents of a site."""

import math
from typing import TYPE_CHECKING, Any, get_args

from stabilitykit.diagnosis.layers import peak, stored
from stabilitykit.errors import MisuseError
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records import Record, Recording
from stabilitykit.records.recording import Kind
from stabilitykit.report.parts import places
from stabilitykit.report.style import (
    BLUE,
    FAINT,
    INK,
    VERMILLION,
    dtype_style,
    heat_map,
    magnitude_axis,
    report_style,
)
from stabilitykit.words import place

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(
    recording: Recording,
    kind: Kind = "headroom",
    *,
    site: str | None = None,
    step: int = 0,
    in_format: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws one step of a recording.

    Args:
        recording: of any run; with `stored_dtype` known, or in 16 bits, the float32 insides of norms are left out.
        kind: "headroom": by layer the least headroom of what the layer stores, in bits; "heat": the same by layer and
            site, sites in order of execution from the bottom up; "exponents": how many elements of one tensor have
            which power of two, beside the format's range.
        site: of "exponents": the tensor, as `Recording.at` takes it; the one that broke first unless given, else the
            one with the largest magnitude.
        step: the forward pass, from 0.
        in_format: the number format that headroom is in; the run's own dtype unless given. Of a run in a wider dtype,
            `in_format="float16"` shows what float16 would overflow: below 0.
        ax: matplotlib axes to draw on; a new figure of pyplot's, which a notebook shows, unless given.

    Returns:
        The axes. A tensor that holds NaN or an infinity is marked as broken and has no headroom; zeros alone, and
        masked tensors, have no place in "headroom".

    Raises:
        MisuseError: for an unknown kind, format or site, and where there is nothing to draw: no such step, no tensor
            in a layer.
    """
    if kind not in get_args(Kind):
        raise MisuseError(f"unknown kind {kind!r}; choose one of: {', '.join(get_args(Kind))}")
    form = number_format(in_format or recording.header.dtype)
    if kind == "exponents":
        found = _chosen(recording, site, step)
        axes = ax or _new((8.0, 3.2))
        with report_style():
            _exponents(axes, found, form)
        return axes
    if site is not None:
        raise MisuseError(f'site= belongs to kind="exponents"; "{kind}" shows every site.')
    cells = _cells(recording, step)
    if not cells:
        raise MisuseError(f"Nothing to draw: step {step} of this recording stores no tensor inside a layer.")
    axes = ax or _new((8.0, 3.6) if kind == "headroom" else (8.0, max(3.0, 1.3 + 0.2 * len(cells))))
    with report_style():
        (_headroom if kind == "headroom" else _heat)(axes, cells, form, recording)
    return axes


def _new(size: tuple[float, float]) -> "Axes":
    """Axes in the report's style; the figure is made outside of it, so that what a notebook's backend sets up stays."""
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=size, dpi=100, layout="constrained", facecolor="white")
    with report_style():
        return figure.add_subplot()


def _cells(recording: Recording, step: int) -> dict[str, dict[int, Record]]:
    """By site, as every layer has it, then by layer, the tensors that are stored."""
    found: dict[str, dict[int, Record]] = {}
    for record in stored(recording):
        if record.layer is not None and record.step == step:
            found.setdefault(places.relative(record), {}).setdefault(record.layer, record)
    return found


def _room(record: Record | None, form: NumberFormat) -> float:
    """Bits; -inf for what has lost elements, inf for zeros, NaN for what is not there."""
    if record is None or (record.amax is None and not record.lost):
        return math.nan
    return -math.inf if record.lost or record.amax is None else form.headroom(record.amax)


def _headroom(axes: "Axes", cells: dict[str, dict[int, Record]], form: NumberFormat, recording: Recording) -> None:
    layers = sorted({layer for row in cells.values() for layer in row})
    from matplotlib.ticker import MaxNLocator

    rooms = {layer: [_room(row.get(layer), form) for row in cells.values()] for layer in layers}
    least = [min((room for room in rooms[layer] if room < math.inf), default=math.nan) for layer in layers]
    name = recording.header.dtype
    finite = [room if math.isfinite(room) else math.nan for room in least]
    axes.plot(layers, finite, label=f"{name} run", **dtype_style(name))
    axes.axhline(0, color=INK, linewidth=1.0, linestyle=(0, (1, 1.5)), zorder=1.5, label=f"{form.name} maximum")
    broken = [layer for layer in layers if -math.inf in rooms[layer]]
    if broken:
        at = [0.0] * len(broken)
        axes.plot(broken, at, color=VERMILLION, linestyle="", marker="x", markersize=7, label="holds NaN or inf")
    axes.margins(y=0.12)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"least headroom in {form.name} [bits]")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.3)


def _heat(axes: "Axes", cells: dict[str, dict[int, Record]], form: NumberFormat, recording: Recording) -> None:
    rows, layers = list(cells.values()), range(max(layer for row in cells.values() for layer in row) + 1)
    heat_map(
        axes,
        [[_room(row.get(layer), form) for layer in layers] for row in rows],
        rows=[places.kind(next(iter(row.values()))) for row in rows],
        columns=[str(layer) for layer in layers],
        label=f"headroom in {form.name} [bits]",
        hover=lambda row, layer: "",
        limit=0,
    )
    axes.set_xlabel(f"layer, {recording.header.dtype} run")


def _chosen(recording: Recording, site: str | None, step: int) -> Record:
    if site is not None:
        found: Record | None = recording.at(site, step)
    else:
        of_step = [record for record in recording if record.step == step and record.exponents]
        found = next((record for record in of_step if record.broke is not None), None)
        found = found or peak(record for record in stored(recording) if record.step == step and record.exponents)
    if found is None or not found.exponents:
        of = f"step {step} of this recording" if found is None else found.site
        raise MisuseError(f"Nothing to draw: {of} has no finite element but zeros.")
    return found


def _exponents(axes: "Axes", record: Record, form: NumberFormat) -> None:
    first, counts = record.exponent_first, record.exponents
    lowest = form.emin - form.precision + 1  # of the smallest subnormal
    axes.axvspan(form.emin - 0.5, form.emax + 0.5, color=FAINT, alpha=0.6, linewidth=0, zorder=0, label="normal")
    hatched: dict[str, Any] = {"fill": False, "edgecolor": FAINT, "hatch": "//", "linewidth": 0, "zorder": 0}
    axes.axvspan(lowest - 0.5, form.emin - 0.5, label="subnormal", **hatched)
    exponents = range(first, first + len(counts))
    for label, colour, hatch, shown in (
        (None, BLUE, None, [at for at in exponents if at <= form.emax]),
        ("past the maximum", VERMILLION, "xxxx", [at for at in exponents if at > form.emax]),
    ):
        if shown:
            heights = [counts[at - first] for at in shown]
            axes.bar(shown, heights, 0.9, label=label, facecolor=colour, hatch=hatch, edgecolor=INK, linewidth=0.3)
    magnitude_axis(axes)
    axes.set_ylim(0.6, max(counts) * 2)
    ends = [first, first + len(counts) - 1]
    if form.emax - form.emin < 100:  # a range that is far wider than the values would leave them no room
        ends += [lowest, form.emax]
    axes.set_xlim(min(ends) - 1, max(ends) + 1)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("exponent, floor(log2 of the magnitude)")
    axes.set_ylabel("elements")
    lost = f"; {record.lost:,} of {record.elements:,} are NaN or infinite" if record.lost else ""
    axes.set_title(f"{place(record)}{lost}", fontsize=9)
    axes.legend(title=form.name, title_fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
