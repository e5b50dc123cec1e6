"""Prompt length in figures: which lengths break, and how headroom shrinks as a text grows."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records.lengths import LengthMap, Span
from stabilitykit.records.sweep import Case
from stabilitykit.report.blocks import Figure, Hover
from stabilitykit.report.outcomes import Text
from stabilitykit.report.style import BACKING, BROKEN, INK, SKY, bits, dtype_style, series_style
from stabilitykit.words import count, listed, quoted, with_bos

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Maps = Sequence[tuple[str, Case, LengthMap]]
"""The name of the text, the case, and what it found."""

# A curve over fewer lengths than this is a table's business.
SHORTEST_CURVE = 8


def _name(text: str, bos: bool | None) -> str:
    return f"{text} {with_bos(bos, mark='')}".strip()


def break_map(rows: Sequence[Text], *, name: str = "first-break") -> Figure:
    """Every length that is known of some texts, a bar each, clean or broken; a panel a dtype."""
    dtypes = sorted(
        {row.dtype for row in rows}, key=lambda name: (number_format(name).bits, -number_format(name).precision, name)
    )
    names = list(dict.fromkeys(_name(row.name, row.bos) for row in rows))
    broken = [row for row in rows if row.broken]
    said = [f"{_name(row.name, row.bos)} in {row.dtype} from {row.broken[0].first:,}" for row in broken]
    saying = f"Breaks: {listed(said, most=12)}." if broken else "No length of any text breaks."
    return Figure(
        name=name,
        title="Which lengths break",
        caption="Every length that is known, on a logarithmic axis, one panel a dtype. Hatched: broken, with the layer "
        "of the first break, and of those at longer lengths where they differ. A diamond is a length "
        "that was run by itself.",
        alt=f"Bars over prompt length, one a text, for {listed(dtypes)}. {saying}",
        draw=partial(_draw_map, rows=rows, names=names, dtypes=dtypes),
        size=(8.0, 1.1 + 0.24 * len(names)),
    )


def _draw_map(
    figure: "matplotlib.figure.Figure", *, rows: Sequence[Text], names: Sequence[str], dtypes: Sequence[str]
) -> list[Hover]:
    from matplotlib.patches import Patch

    panels = figure.subplots(1, len(dtypes), sharex=True, sharey=True, squeeze=False)[0]
    longest = max(span.last for row in rows for span in row.spans)
    hovers = []
    for number, (axes, dtype) in enumerate(zip(panels, dtypes, strict=True)):
        axes.set_title(dtype)
        for row in (row for row in rows if row.dtype == dtype):
            level = names.index(_name(row.name, row.bos))
            for span in row.spans:
                look = {"facecolor": SKY} if span.broke is None else BROKEN
                left, width = span.first - 0.5, span.last - span.first + 1
                axes.broken_barh([(left, width)], (level - 0.36, 0.72), edgecolor=INK, linewidth=0.3, **look)
                if span.direct and span.first == span.last:
                    axes.plot(span.first, level, "D", color=look["facecolor"], markeredgecolor=INK, markersize=4)
                hovers.append(_span_hover(row.name, span, level - 0.5, level + 0.5, number))
            _name_layers(axes, row, level, longest)
        _length_axis(axes, longest)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    for axes in panels:
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    figure.supxlabel("prompt length in tokens", fontsize=9)
    handles = [Patch(facecolor=SKY, label="clean"), Patch(edgecolor=INK, linewidth=0.3, label="broken", **BROKEN)]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return hovers


def _name_layers(axes: "Axes", row: Text, level: int, longest: int) -> None:
    """The layers of the first breaks, from the shortest broken length on, where its bar leaves room for them."""
    if not row.broken:
        return
    left, right = row.broken[0].first - 0.5, max(span.last for span in row.broken) + 0.5
    layers = list(dict.fromkeys(str(span.site if span.layer is None else span.layer) for span in row.broken))
    named = "" if row.broken[0].layer is None else "layer " if len(layers) == 1 else "layers "
    room = math.log(right / left) / math.log(2 * longest + 1)
    for text in (f"{named}{', '.join(layers)}", f"{named.rstrip('s ')} {layers[0]} …".strip()):
        if room > 0.02 * len(text):
            axes.text(math.sqrt(left * right), level, text, ha="center", va="center", fontsize=7, bbox=BACKING)
            return


def _span_hover(name: str, span: Span, bottom: float, top: float, axes: int) -> Hover:
    lengths = f"{span.first:,}" if span.first == span.last else f"{span.first:,} to {span.last:,}"
    text = f"{name}, {lengths} tokens: {'clean' if span.broke is None else 'breaks in ' + str(span.site)}"
    if span.broke is not None and span.token_text is not None:
        text += f", at token {span.broke.position} {quoted(span.token_text)}"
    return Hover(left=span.first - 0.5, right=span.last + 0.5, bottom=bottom, top=top, text=text, axes=axes)


def _length_axis(axes: "Axes", longest: int) -> None:
    """Logarithmic, with ticks at powers of two that read as numbers of tokens."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(0.5, max(longest, 1) + 0.5)
    powers = range(0, int(math.log2(longest)) + 1, 1 if longest < 16 else 2 if longest < 1024 else 3)
    axes.xaxis.set_major_locator(FixedLocator([2**power for power in powers]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def curves(maps: Maps, form: NumberFormat) -> Figure | None:
    """Small multiples, one a text; None where no map is long enough to be a curve."""
    drawn = [(text, case, found) for text, case, found in maps if found.longest >= SHORTEST_CURVE]
    if not drawn:
        return None
    panels = list(dict.fromkeys(text for text, _, _ in drawn))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    left_out = list(dict.fromkeys(text for text, _, _ in maps if text not in panels))
    short = f" Not drawn, being shorter than {SHORTEST_CURVE} tokens: {listed(left_out, most=4)}." if left_out else ""
    said = []
    for text, case, found in drawn:
        if found.first_broken is not None:
            name = _name(text, case.settings.get("bos"))
            said.append(f"{name} breaks in {found.header.dtype} at {found.first_broken:,}")
    return Figure(
        name="headroom-by-length",
        title="Headroom against length",
        caption=f"Bits of headroom below the {form.name} maximum, by the widest dtype that ran a text, which the "
        f"legend names: the running peak of all stored tensors. Below 0 a value overflows {form.name}. A mark is a "
        "dtype's own first break, at the value that broke, and the thin line from it on what broke at longer lengths; "
        f"the text's values may go further, where later layers go higher.{short}",
        alt=f"Curves of headroom in bits falling with prompt length, one panel for each of {listed(panels)}. "
        + (f"{listed(said, most=12)}." if said else "Nothing breaks."),
        draw=partial(_draw_curves, maps=drawn, panels=panels, rows=rows, columns=columns, form=form),
        size=(8.0, 0.9 + 1.75 * rows),
    )


def _draw_curves(
    figure: "matplotlib.figure.Figure",
    *,
    maps: Maps,
    panels: Sequence[str],
    rows: int,
    columns: int,
    form: NumberFormat,
) -> list[Hover]:
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    longest = max(found.longest for _, _, found in maps)
    hovers: list[Hover] = []
    handles: dict[str, Artist] = {}
    for number, text in enumerate(panels):
        axes = grid[number]
        axes.set_title(text)
        axes.axhline(0, color=dtype_style(form.name)["color"], linewidth=1.0, linestyle=(0, (1, 1.5)))
        own = [(case, found) for name, case, found in maps if name == text]
        for bos in dict.fromkeys(case.settings.get("bos") for case, _ in own):
            these = [found for case, found in own if case.settings.get("bos") == bos]
            handles |= _draw_text(axes, these, bos, form)
        hovers += _curve_hovers(text, own, number, form)
        _length_axis(axes, longest)
        axes.tick_params(labelbottom=number + columns >= len(panels))
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    low, high = grid[0].get_ylim()
    low = min(low, -0.5)
    grid[0].set_ylim(low, high)
    for axes in grid[: len(panels)]:
        axes.axhspan(low, 0, facecolor=dtype_style(form.name)["color"], alpha=0.12, linewidth=0)
    figure.supxlabel("prompt length in tokens", fontsize=9)
    figure.supylabel(f"headroom in {form.name}, bits", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=min(len(handles), 4))
    return [replace(hover, bottom=low, top=high) for hover in hovers]


def _draw_text(axes: "Axes", maps: Sequence[LengthMap], bos: bool | None, form: NumberFormat) -> "dict[str, Artist]":
    """One curve, and for each dtype that broke a mark and a thin line; what to call them in the legend."""
    widest = max(maps, key=_width)
    lengths, room = _steps(_sound(widest), form)
    style = series_style(0 if bos else 2) | {"marker": ""}
    handles: dict[str, Artist] = {}
    if any(math.isfinite(bits_left) for bits_left in room):
        (line,) = axes.step(lengths, room, where="post", **style)
        handles[f"{with_bos(bos, mark='')} ({widest.header.dtype})".strip()] = line
    for found in maps:
        broken = [span for span in found.spans if span.broke is not None]
        if not broken:
            continue
        dtype = found.header.dtype
        rooms = [_room_at(span, widest, form) for span in broken]
        look = dtype_style(dtype)
        axes.step(
            [*(span.first for span in broken), broken[-1].last], [*rooms, rooms[-1]], where="post",
            **look | {"marker": "", "linewidth": 1.0},
        )  # fmt: skip
        mark_look = look | {"linestyle": "", "markersize": 7, "markeredgecolor": INK}
        (mark,) = axes.plot(broken[0].first, rooms[0], zorder=3, **mark_look)
        handles[f"first break in {dtype}"] = mark
    return handles


def _width(found: LengthMap) -> tuple[bool, float, int]:
    """Of several dtypes the one whose curve shows most: unbroken, and then of the largest range."""
    form = number_format(found.header.dtype)
    return found.first_broken is None, form.largest, form.precision


def _sound(found: LengthMap) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """The curve, with a gap where a length breaks: what was stored before a break is not the text's peak."""
    curve = found.curve().copy()
    for span in found.spans:
        if span.broke is not None:
            curve[span.first - 1 : span.last] = math.nan
    return curve


def _room_at(span: Span, widest: LengthMap, form: NumberFormat) -> float:
    """Headroom of the value that broke; of the curve where that value says nothing; 0 where neither is known."""
    assert span.broke is not None
    if span.broke.kind == "overflow" and span.broke.value is not None and math.isfinite(span.broke.value):
        return form.headroom(abs(span.broke.value))
    curve = widest.curve()
    amax = float(curve[span.first - 1]) if span.first <= curve.size else math.nan
    return form.headroom(amax) if math.isfinite(amax) and amax else 0.0


def _steps(curve: "np.ndarray[tuple[int], np.dtype[np.float64]]", form: NumberFormat) -> tuple[list[int], list[float]]:
    """Lengths at which the curve changes, and the last one, with headroom in `form`; NaN leaves a gap."""
    changes = [0, *(np.flatnonzero(np.diff(np.nan_to_num(curve, nan=-1.0))) + 1).tolist(), curve.size - 1]
    return [index + 1 for index in changes], [form.headroom(float(curve[index])) for index in changes]


def _curve_hovers(text: str, own: Sequence[tuple[Case, LengthMap]], axes: int, form: NumberFormat) -> list[Hover]:
    """One a stretch between powers of two: the headroom at its end."""
    hovers = []
    longest = max(found.longest for _, found in own)
    left = 1
    while left <= longest:
        right = min(2 * left - 1, longest)
        said = []
        for case, found in own:
            curve = _sound(found)
            if right <= curve.size and math.isfinite(curve[right - 1]):
                room = bits(form.headroom(float(curve[right - 1])))
                said.append(f"{with_bos(case.settings.get('bos'), mark='')} {found.header.dtype} {room}".strip())
        if said:
            what = f"{text}, {count(right, 'token')}, bits of headroom in {form.name}: {', '.join(said)}"
            hovers.append(Hover(left=left, right=right + 1, bottom=0, top=0, text=what, axes=axes))
        left = right + 1
    return hovers
