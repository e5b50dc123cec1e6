"""How the magnitudes at the worst sites spread over powers of two, against the formats' ranges."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from stabilitykit.diagnosis.layers import stored
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records import Record
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Cell, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.parts import choose, places
from stabilitykit.report.parts.choose import Group
from stabilitykit.report.style import BLUE, FAINT, INK, VERMILLION, dtype_style, magnitude_axis, share
from stabilitykit.report.tables import table
from stabilitykit.words import counted, number, place

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

KEY, TITLE = "exponents", "Exponents at the worst sites"

OPENING = (
    "How many elements have which power of two where a run broke first, and at the kinds of site with the largest "
    "magnitudes, each in its worst layer. The scale of the counts is logarithmic: a bar that looks half as high may "
    "stand for a thousandth of the elements; and a format whose range covers every bar may still be too coarse."
)

_SITES = 6
_COLUMNS = 3


def section(results: Results) -> Section:
    """Histograms of the chosen groups' widest runs, and what each format would make of the same tensors."""
    blocks: list[Block] = []
    for group in choose.chosen(results):
        worst = _worst(group)
        if worst:
            blocks += [Prose(" ".join(_sentences(group, worst))), _figure(group, worst), _table(group, worst)]
    if not blocks:
        return choose.nothing(KEY, TITLE, results, what="histograms of exponents")
    return Section(key=KEY, title=TITLE, opening=choose.opening(results, OPENING), blocks=blocks)


def _worst(group: Group) -> list[Record]:
    """The widest run's records where any run broke first, and those with the largest magnitudes, one a kind of site.

    All are from before the widest run's own break, or are that break.
    """
    breaks = {first.site for run in group.runs.values() if (first := choose.first_break(run)) is not None}
    own = choose.first_break(group.widest)
    whole = {id(record) for record in [*choose.intact(group.widest), *([] if own is None else [own])]}
    shown = [r for r in stored(group.widest) if id(r) in whole and r.exponents and choose.magnitude(r)]
    broken: dict[str, Record] = {}
    tops: dict[str, Record] = {}
    for record in shown:
        if record.site in breaks:
            broken.setdefault(record.site, record)
        elif not record.site.startswith("sampler"):
            known = tops.get(places.kind(record))
            if known is None or _size(record) > _size(known):
                tops[places.kind(record)] = record
    return [*broken.values(), *sorted(tops.values(), key=_size, reverse=True)][: max(_SITES, len(broken))]


def _size(record: Record) -> float:
    return choose.magnitude(record) or 0.0


def _overflows(name: str, record: Record) -> int:
    """Elements that overflow the format; in a run in it, those that did."""
    return record.formats[name].overflow + (record.lost if record.dtype == name else 0)


def _sentences(group: Group, worst: Sequence[Record]) -> Iterator[str]:
    dtype, form = group.widest.header.dtype, group.form.name
    yield f"**{group.name}**, {dtype} run:"
    found = [(record, record.formats[form]) for record in worst if form in record.formats]
    if not found:
        yield f"no exact counts for {form} were recorded."
        return
    past = [f"{lost:,} of {r.elements:,} in {place(r)}" for r, _ in found if (lost := _overflows(form, r))]
    until = "" if choose.first_break(group.widest) is None else " up to the break of this run"
    if past and form == dtype:
        yield f"{form} overflows in {'; '.join(past)}, where this run breaks."
    elif past:
        yield f"{form} would overflow in {'; '.join(past)}."
    else:
        yield f"none of the elements shown would overflow in {form}{until}."
    elements = sum(record.elements for record, _ in found)
    small, gone = sum(c.subnormal for _, c in found), sum(c.zero for _, c in found)
    yield (
        f"At its small end, {share(small / elements)} of all elements shown would be subnormal in {form} and "
        f"{share(gone / elements)} would round to zero."
    )
    yield from (f"{sentence}." for sentence in choose.breaks(group))


def _figure(group: Group, worst: Sequence[Record]) -> Figure:
    rows = math.ceil(len(worst) / _COLUMNS)
    first, form = max(worst, key=_size), group.form
    return Figure(
        name=f"exponents-{group.slug}",
        title=f"Exponents at the worst sites, {group.widest.header.dtype} run: {group.name}",
        caption=(
            "A bar at e counts the elements with magnitudes from 2^e to 2^(e+1); zeros have no bar. Shaded behind the "
            f"bars is the range of {form.name}; below, that of each format: solid where normal, hatched where "
            "subnormal. A format's last bin may hold values above its maximum."
        ),
        alt=(
            f"{len(worst)} histograms over powers of two. The largest magnitude is {number(_size(first))}, in "
            f"{place(first)}; the {form.name} maximum is {number(form.largest)}, in the bin 2^{form.emax}."
        ),
        draw=functools.partial(_draw, worst=worst, formats=_formats(group), form=form),
        size=(8.0, 1.5 + 1.9 * rows),
    )


def _formats(group: Group) -> list[NumberFormat]:
    names = dict.fromkeys([group.form.name, *group.widest.header.formats, *group.runs])
    return [number_format(name) for name in names]


def _draw(
    figure: "matplotlib.figure.Figure", worst: Sequence[Record], formats: Sequence[NumberFormat], form: NumberFormat
) -> list[Hover]:
    columns = min(len(worst), _COLUMNS)
    rows = math.ceil(len(worst) / columns)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[*([1.6] * rows), 1.0])
    low = min(form.emin - form.precision, *(record.exponent_first for record in worst)) - 1
    high = max(form.emax, *(record.exponent_first + len(record.exponents) - 1 for record in worst)) + 2
    tallest = max(max(record.exponents) for record in worst)
    hovers: list[Hover] = []
    for index, record in enumerate(worst):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        magnitude_axis(axes)
        axes.set_xlim(low, high)
        axes.set_ylim(0.6, tallest * 2)
        axes.set_title(place(record).replace(", ", ",\n", 1), fontsize=8)
        axes.tick_params(labelleft=index % columns == 0)
        if index % columns == 0:
            axes.set_ylabel("elements")
        hovers += _bars(axes, record, form)
    for column in range(columns):
        axes = figure.add_subplot(grid[rows, column])
        axes.set_xlim(low, high)
        hovers += _ranges(axes, formats, named=column == 0)
        axes.set_xlabel("exponent, floor(log2 |x|)")
    return hovers


def _bars(axes: "Axes", record: Record, form: NumberFormat) -> Iterator[Hover]:
    bottom, top = axes.get_ylim()
    number_of_axes = len(axes.get_figure(root=True).axes) - 1  # type: ignore[union-attr]
    axes.axvspan(form.emin - 0.5, form.emax + 0.5, color=FAINT, alpha=0.6, linewidth=0, zorder=0)
    axes.axvspan(_lowest(form) - 0.5, form.emin - 0.5, fill=False, hatch="//", edgecolor=FAINT, zorder=0)
    for index, amount in enumerate(record.exponents):
        if amount:
            exponent = record.exponent_first + index
            past = exponent > form.emax
            axes.bar(
                exponent,
                amount,
                width=0.9,
                facecolor=VERMILLION if past else BLUE,
                edgecolor=INK,
                linewidth=0.3,
                hatch="xxxx" if past else None,
            )
            text = f"2^{exponent} to 2^{exponent + 1}: {amount:,} of {counted(record.elements, 'element')}"
            yield Hover(
                left=exponent - 0.5, right=exponent + 0.5, bottom=bottom, top=top, text=text, axes=number_of_axes
            )


def _lowest(form: NumberFormat) -> int:
    """The exponent of the smallest subnormal."""
    return form.emin - form.precision + 1


def _ranges(axes: "Axes", formats: Sequence[NumberFormat], *, named: bool) -> Iterator[Hover]:
    number_of_axes = len(axes.get_figure(root=True).axes) - 1  # type: ignore[union-attr]
    for row, form in enumerate(formats):
        colour = dtype_style(form.name)["color"]
        subnormal, normal, end = _lowest(form) - 0.5, form.emin - 0.5, form.emax + 0.5
        axes.barh(row, end - normal, left=normal, height=0.6, color=colour)
        axes.barh(row, normal - subnormal, left=subnormal, height=0.6, fill=False, edgecolor=colour, hatch="/////")
        text = (
            f"{form.name}: subnormal from {number(form.smallest_subnormal)}, normal from "
            f"{number(form.smallest_normal)}, largest {number(form.largest)}"
        )
        left, right = axes.get_xlim()
        yield Hover(left=left, right=right, bottom=row - 0.5, top=row + 0.5, text=text, axes=number_of_axes)
    axes.set_ylim(len(formats) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(formats)), [form.name for form in formats] if named else [""] * len(formats))
    axes.tick_params(axis="y", length=0, labelsize=7)


_COUNTED: dict[str, Callable[[str, Record], Cell]] = {
    "overflow": _overflows,
    "subnormal": lambda name, record: record.formats[name].subnormal,
    "to zero": lambda name, record: record.formats[name].zero,
}


def _table(group: Group, worst: Sequence[Record]) -> Table:
    formats = [name for name in group.widest.header.formats if all(name in record.formats for record in worst)]
    columns: list[tuple[Column, Callable[[Record], Cell]]] = [
        (Column("site"), places.kind),
        (Column("layer"), lambda record: record.layer),
        (Column("elements"), lambda record: record.elements),
        (Column("zeros"), lambda record: record.zero),
        (Column("smallest"), lambda record: record.smallest),
        (Column("largest"), choose.magnitude),
    ]
    for name in formats:
        columns += [(Column(f"{name} {what}"), functools.partial(of, name)) for what, of in _COUNTED.items()]
    return table(
        f"exponent-counts-{group.slug}",
        f"What each format would make of the worst sites, {group.widest.header.dtype} run: {group.name}",
        worst,
        columns,
        note="Exact counts of elements after rounding to the format; smallest is the smallest that is not zero.",
    )
