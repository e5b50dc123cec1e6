"""Length by dtype: where each text first breaks, and how its headroom shrinks as it grows."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from stabilitykit.formats import FLOAT16, number_format
from stabilitykit.records.lengths import LengthMap, Span
from stabilitykit.records.sweep import Case, Results
from stabilitykit.report.blocks import Block, Cell, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.outcomes import Names, Outcome, Text, outcomes, texts
from stabilitykit.report.style import BACKING, BROKEN, INK, SKY, bits, dtype_style, series_style
from stabilitykit.words import code, count, grouped, listed, quoted, with_bos

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Maps = Sequence[tuple[str, Case, LengthMap]]

# A curve over fewer lengths than this is a table's business.
SHORTEST_CURVE = 8


def section(results: Results) -> Section:
    """The map, the curves, and the tables of first breaks, spans and checks, of whatever has finished."""
    names = Names(results.plan.cases)
    maps = [(names(case), case, found) for case, found in results.length_maps()]
    found = outcomes(results)
    title = "Length × dtype"
    if not found:
        return Section(
            key="lengths", title=title, opening="No case that runs a prompt has finished: no length is known."
        )
    blocks: list[Block] = [break_map(list(texts(found)))]
    if maps:
        figure = _curves(maps)
        blocks += [
            *([] if figure is None else [figure]),
            _first_breaks(maps),
            Prose(_trust(maps)),
            *([_checks(maps)] if any(lengths.checks for _, _, lengths in maps) else []),
            _spans(maps),
        ]
    else:
        blocks.append(
            Prose("No case over a range of lengths has finished, so only the lengths of single runs are known.")
        )
    if runs := [outcome for outcome in found if outcome.case.kind == "run"]:
        blocks.append(_runs(runs))
    return Section(
        key="lengths",
        title=title,
        opening="At which lengths each text breaks in each dtype, and how much room is left before it does. A length "
        "is not a cause by itself: a longer prompt lets in more tokens, one of which may grow too large, so another "
        "text breaks at another length.",
        blocks=blocks,
    )


def _name(text: str, bos: bool | None) -> str:
    return f"{text} {with_bos(bos, mark='')}".strip()


def break_map(rows: Sequence[Text], *, name: str = "first-break") -> Figure:
    """Every length that is known of some texts, a bar each, clean or broken; a panel a dtype."""
    dtypes = sorted({row.dtype for row in rows}, key=lambda name: (number_format(name).bits, name != "float16", name))
    names = list(dict.fromkeys(_name(row.name, row.bos) for row in rows))
    broken = [row for row in rows if row.broken]
    said = [f"{_name(row.name, row.bos)} in {row.dtype} from {row.broken[0].first:,}" for row in broken]
    saying = f"Breaks: {listed(said, most=12)}." if broken else "No length of any text breaks."
    return Figure(
        name=name,
        title="Which lengths break",
        caption="Every length that is known, on a logarithmic axis, one panel a dtype. Hatched: broken, with the layer "
        "of the first break. A diamond is a length that was run by itself.",
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
    """The layer of the shortest broken length's first break, where the broken lengths leave room for it."""
    if not row.broken:
        return
    first = row.broken[0]
    left, right = first.first - 0.5, max(span.last for span in row.broken) + 0.5
    if math.log(right / left) > 0.15 * math.log(2 * longest + 1):
        text = f"layer {first.layer}" if first.layer is not None else str(first.site)
        axes.text(math.sqrt(left * right), level, text, ha="center", va="center", fontsize=7, bbox=BACKING)


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


def _curves(maps: Maps) -> Figure | None:
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
        caption="Bits left below float16's largest value, by the widest dtype that ran: the running peak of all stored "
        "tensors. Below 0 lies what float16 cannot hold. A mark is a dtype's own first break, at the value that broke; "
        f"its curve may lie lower, where later layers go higher.{short}",
        alt=f"Curves of headroom in bits falling with prompt length, one panel for each of {listed(panels)}. "
        + (f"{listed(said, most=12)}." if said else "Nothing breaks."),
        draw=partial(_draw_curves, maps=drawn, panels=panels, rows=rows, columns=columns),
        size=(8.0, 0.9 + 1.75 * rows),
    )


def _draw_curves(
    figure: "matplotlib.figure.Figure", *, maps: Maps, panels: Sequence[str], rows: int, columns: int
) -> list[Hover]:
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    longest = max(found.longest for _, _, found in maps)
    hovers: list[Hover] = []
    handles: dict[str, Artist] = {}
    for number, text in enumerate(panels):
        axes = grid[number]
        axes.set_title(text)
        axes.axhline(0, color=dtype_style("float16")["color"], linewidth=1.0, linestyle=(0, (1, 1.5)))
        own = [(case, found) for name, case, found in maps if name == text]
        for bos in dict.fromkeys(case.settings.get("bos") for case, _ in own):
            these = [found for case, found in own if case.settings.get("bos") == bos]
            handles |= _draw_text(axes, these, bos)
        hovers += _curve_hovers(text, own, number)
        _length_axis(axes, longest)
        axes.tick_params(labelbottom=number + columns >= len(panels))
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    low, high = grid[0].get_ylim()
    low = min(low, -1.0)
    grid[0].set_ylim(low, high)
    for axes in grid[: len(panels)]:
        axes.axhspan(low, 0, facecolor=dtype_style("float16")["color"], alpha=0.12, linewidth=0)
    figure.supxlabel("prompt length in tokens", fontsize=9)
    figure.supylabel("headroom in float16, bits", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=min(len(handles), 4))
    return [replace(hover, bottom=low, top=high) for hover in hovers]


def _draw_text(axes: "Axes", maps: Sequence[LengthMap], bos: bool | None) -> "dict[str, Artist]":
    """One curve, and a mark for each dtype that broke; what to call them in the legend."""
    widest = max(maps, key=lambda found: number_format(found.header.dtype).precision)
    lengths, room = _steps(_sound(widest))
    style = series_style(0 if bos else 2) | {"marker": ""}
    handles: dict[str, Artist] = {}
    if any(math.isfinite(bits_left) for bits_left in room):
        (line,) = axes.step(lengths, room, where="post", **style)
        handles[f"{with_bos(bos, mark='')} ({widest.header.dtype})".strip()] = line
    for found in maps:
        first = next((span for span in found.spans if span.broke is not None), None)
        if first is None:
            continue
        dtype = found.header.dtype
        look = dtype_style(dtype) | {"linestyle": "", "markersize": 7, "markeredgecolor": INK}
        (mark,) = axes.plot(first.first, _room_at(first, widest), zorder=3, **look)
        handles[f"first break in {dtype}"] = mark
    return handles


def _sound(found: LengthMap) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """The curve, with a gap where a length breaks: what was stored before a break is not the text's peak."""
    curve = found.curve().copy()
    for span in found.spans:
        if span.broke is not None:
            curve[span.first - 1 : span.last] = math.nan
    return curve


def _room_at(span: Span, widest: LengthMap) -> float:
    """Headroom of the value that broke; of the curve where that value says nothing; 0 where neither is known."""
    assert span.broke is not None
    if span.broke.kind == "overflow" and span.broke.value is not None and math.isfinite(span.broke.value):
        return FLOAT16.headroom(abs(span.broke.value))
    curve = widest.curve()
    amax = float(curve[span.first - 1]) if span.first <= curve.size else math.nan
    return FLOAT16.headroom(amax) if math.isfinite(amax) and amax else 0.0


def _steps(curve: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> tuple[list[int], list[float]]:
    """Lengths at which the curve changes, and the last one, with headroom in float16; NaN leaves a gap."""
    changes = [0, *(np.flatnonzero(np.diff(np.nan_to_num(curve, nan=-1.0))) + 1).tolist(), curve.size - 1]
    return [index + 1 for index in changes], [FLOAT16.headroom(float(curve[index])) for index in changes]


def _curve_hovers(text: str, own: Sequence[tuple[Case, LengthMap]], axes: int) -> list[Hover]:
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
                room = bits(FLOAT16.headroom(float(curve[right - 1])))
                said.append(f"{with_bos(case.settings.get('bos'), mark='')} {found.header.dtype} {room}".strip())
        if said:
            what = f"{text}, {count(right, 'token')}, bits of headroom in float16: {', '.join(said)}"
            hovers.append(Hover(left=left, right=right + 1, bottom=0, top=0, text=what, axes=axes))
        left = right + 1
    return hovers


def _first_breaks(maps: Maps) -> Table:
    return Table(
        name="first-breaks",
        title="First breaks",
        columns=[
            *_WHOSE,
            Column(name="lengths from 1 to", unit="tokens", format=grouped),
            Column(name="first broken", unit="tokens", format=grouped),
            Column(name="in"),
            Column(name="at token"),
            Column(name="value there"),
            Column(name="headroom at the longest clean", unit="bits", format=bits),
            Column(name="runs"),
            Column(name="checks that agree"),
            Column(name="worst", unit="ulp"),
        ],
        rows=[_first_break_row(text, case, found) for text, case, found in maps],
        note="Headroom is in the dtype's own bits. Runs are the forward passes that say all lengths; checks are "
        "lengths run again directly, worst how far apart any site's peak is in them.",
    )


_WHOSE = (Column(name="text"), Column(name="<bos>"), Column(name="dtype"))


def _whose(text: str, case: Case, dtype: str) -> list[Cell]:
    return [text, case.settings.get("bos"), dtype]


def _first_break_row(text: str, case: Case, found: LengthMap) -> list[Cell]:
    broken = next((span for span in found.spans if span.broke is not None), None)
    clean = max((span.last for span in found.spans if span.broke is None), default=None)
    amax = None if clean is None else float(found.curve()[clean - 1])
    agree = sum(check.agrees for check in found.checks)
    return [
        *_whose(text, case, found.header.dtype),
        found.longest,
        found.first_broken,
        None if broken is None else broken.site,
        None if broken is None or broken.token_text is None else quoted(broken.token_text),
        None if broken is None or broken.broke is None else broken.broke.value,
        None if amax is None or math.isnan(amax) else number_format(found.header.dtype).headroom(amax),
        found.runs,
        f"{agree} of {len(found.checks)}" if found.checks else None,
        max((check.ulp for check in found.checks), default=None),
    ]


def _trust(maps: Maps) -> str:
    """How far the lengths that were not run themselves can be trusted."""
    checks = [check for _, _, found in maps for check in found.checks]
    wrong = [(text, check) for text, _, found in maps for check in found.checks if not check.agrees]
    near = [(text, span) for text, _, found in maps for span in found.spans if span.near and not span.direct]
    passes, lengths = sum(found.runs for _, _, found in maps), sum(found.longest for _, _, found in maps)
    source = f"{'comes' if lengths == 1 else 'come'} from {count(passes, 'forward pass', 'forward passes')}"
    parts = [f"{count(lengths, 'length')} in {count(len(maps), 'case')} {source}."]
    if not checks:
        parts.append("None was run again directly, so nothing here checks them.")
    elif not wrong:
        agree = "was run again directly and agrees" if len(checks) == 1 else "were run again directly and all agree"
        peak, site = max(check.peak_ulp for check in checks), max(check.ulp for check in checks)
        beyond, compared = sum(check.beyond for check in checks), sum(check.compared for check in checks)
        same = f"{count(len(checks), 'length')} {agree}: the same first break, and"
        parts.append(
            f"{same} the largest peak within {peak:.3g} ulp. Of single sites {beyond:,} in {compared:,} are further "
            f"apart than four ulp, by {site:.3g} at most: kernels of another shape sum in another order."
            if beyond
            else f"{same} peaks within {site:.3g} ulp."
        )
    else:
        where = listed([f"{code(text)} at {count(check.length, 'token')}" for text, check in wrong], most=4)
        parts.append(
            f"**{len(wrong):,} of {count(len(checks), 'length')} run again directly "
            f"{'disagrees' if len(wrong) == 1 else 'disagree'}**: {where}."
        )
    if near:
        where = listed([f"{code(text)} at {_between(span)}" for text, span in near], most=4)
        parts.append(f"Undecided, because the value that decides lies within eight ulp of the limit: {where}.")
    return " ".join(parts)


def _between(span: Span) -> str:
    return count(span.first, "token") if span.first == span.last else f"{span.first:,} to {span.last:,} tokens"


def _checks(maps: Maps) -> Table:
    return Table(
        name="length-checks",
        title="Lengths run again directly",
        columns=[
            *_WHOSE,
            Column(name="length", unit="tokens", format=grouped),
            Column(name="first break"),
            Column(name="first break, directly"),
            Column(name="agrees"),
            Column(name="largest peak apart", unit="ulp"),
            Column(name="worst site apart", unit="ulp"),
            Column(name="worst site"),
            Column(name="relative"),
            Column(name="sites apart by more than four ulp"),
            Column(name="sites compared"),
        ],
        rows=[
            [
                *_whose(text, case, found.header.dtype),
                check.length,
                check.site,
                check.direct_site,
                check.agrees,
                check.peak_ulp,
                check.ulp,
                check.ulp_site,
                check.relative,
                check.beyond,
                check.compared,
            ]
            for text, case, found in maps
            for check in found.checks
        ],
        note="A length agrees where both ways break first at the same site, or not at all, and the largest peak of all "
        "sites is no further apart than four ulp, in units of the dtype at that peak.",
    )


def _spans(maps: Maps) -> Table:
    return Table(
        name="spans",
        title="Every stretch of lengths with the same first break",
        columns=[
            *_WHOSE,
            Column(name="from", unit="tokens", format=grouped),
            Column(name="to", unit="tokens", format=grouped),
            Column(name="first break"),
            Column(name="what"),
            Column(name="kind"),
            Column(name="at token"),
            Column(name="position"),
            Column(name="value"),
            Column(name="from a run of", unit="tokens", format=grouped),
            Column(name="undecided"),
        ],
        rows=[
            [
                *_whose(text, case, found.header.dtype),
                span.first,
                span.last,
                span.site,
                span.label,
                None if span.broke is None else span.broke.kind,
                None if span.token_text is None else quoted(span.token_text),
                None if span.broke is None else span.broke.position,
                None if span.broke is None else span.broke.value,
                span.run,
                span.near and not span.direct,
            ]
            for text, case, found in maps
            for span in found.spans
        ],
    )


def _runs(runs: Sequence[Outcome]) -> Table:
    return Table(
        name="runs",
        title="Single runs",
        columns=[
            *_WHOSE,
            Column(name="length", unit="tokens", format=grouped),
            Column(name="first break"),
            Column(name="at token"),
            Column(name="value there"),
            Column(name="headroom", unit="bits", format=bits),
            Column(name="sampling raised"),
        ],
        rows=[
            [
                *_whose(run.text, run.case, run.dtype),
                span.first,
                span.site,
                None if span.token_text is None else quoted(span.token_text),
                None if span.broke is None else span.broke.value,
                run.headroom,
                run.error,
            ]
            for run in runs
            for span in run.spans
        ],
    )
