"""Headroom as maps: layer × site, and layer × position."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stabilitykit.diagnosis.layers import peak, stored
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records import Record, Recording
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.parts import choose, places
from stabilitykit.report.parts.choose import Group
from stabilitykit.report.style import bits, heat_map
from stabilitykit.report.tables import table
from stabilitykit.words import at_token, counted, number, place

if TYPE_CHECKING:
    import matplotlib.figure

Cells = dict[str, dict[int, Record]]  # by relative site, then by layer

KEY, TITLE = "heat", "Headroom by layer, site and position"

OPENING = (
    "How often each tensor's largest magnitude could double before it exceeded the {} maximum, {}: its headroom in "
    "bits, negative above the maximum. The maps of a wider run show every place that would overflow, while a narrow "
    "run is meaningless after its first overflow. Headroom on this prompt says nothing about another."
)

_MOST_COLUMNS = 120  # narrower cells cannot be pointed at


def section(results: Results) -> Section:
    """Maps of the chosen groups: of the widest run, and of every run that lost elements in a layer."""
    blocks: list[Block] = []
    for group in choose.chosen(results):
        blocks += _blocks(group)
    if not blocks:
        return choose.nothing(KEY, TITLE, results, what="a tensor inside a layer")
    text = OPENING.format(results.form.name, number(results.form.largest))
    return Section(key=KEY, title=TITLE, opening=choose.opening(results, text), blocks=blocks)


def _blocks(group: Group) -> Iterator[Block]:
    widest = group.widest
    cells = _cells(widest)
    if not cells:
        return
    yield Prose(" ".join(_sentences(group)))
    yield _site_map(group, widest)
    yield _table(group)
    for recording in group.runs.values():
        if recording is not widest and any(record.lost for record in _records(_cells(recording))):
            yield _site_map(group, recording)
    by_position = _residual_by_position(widest)
    if by_position:
        yield _position_map(group, by_position)
    else:
        yield Prose("No peaks by position were recorded in this run, so there is no map of layer × position.")


def _sentences(group: Group) -> Iterator[str]:
    widest, form = group.widest, group.form
    inside = _records(_known(widest))
    sizes = [(record, size) for record in inside if (size := choose.magnitude(record)) is not None]
    past = [record for record, size in sizes if form.overflows(size)]
    until = "" if choose.first_break(widest) is None else " up to its break, after which it shows nothing,"
    yield f"**{group.name}**:"
    if sizes:
        top, size = max(sizes, key=lambda pair: pair[1])
        yield (
            f"the least headroom in the {widest.header.dtype} run{until} is {bits(form.headroom(size))} bits, in "
            f"{place(top)}{at_token(*choose.peak_token(widest, top))}."
        )
    of_run = f"of the {widest.header.dtype} run{until}"
    yield (
        f"{len(past)} of {counted(len(inside), 'tensor')} in the layers {of_run} "
        f"{'holds' if len(past) == 1 else 'hold'} a value that overflows {form.name}."
        if past
        else f"No value of the {counted(len(inside), 'tensor')} in the layers {of_run} overflows {form.name}."
    )
    before = {id(record) for record in choose.intact(widest)}
    outside = peak(r for r in stored(widest) if r.layer is None and id(r) in before)
    if outside is not None and outside.amax is not None:
        room = bits(form.headroom(outside.amax))
        yield f"Outside the layers the least headroom is {room} bits, in {place(outside)}."
    for dtype, recording in group.runs.items():
        if recording is not widest and choose.first_break(recording) is None:
            apart = _apart(_cells(widest), _cells(recording))
            if apart is not None:
                yield f"The {dtype} run has no map of its own: its headroom is the same within {bits(apart)} bits."
    yield from (f"{sentence}." for sentence in choose.breaks(group))


def _cells(recording: Recording) -> Cells:
    """The tensors that the layers store in the run's dtype, in order of execution."""
    found: Cells = {}
    for record in stored(recording):
        if record.layer is not None and record.step == 0:
            found.setdefault(places.relative(record), {}).setdefault(record.layer, record)
    return found


def _known(recording: Recording) -> Cells:
    """Those up to the run's first break, the one that broke too."""
    first = choose.first_break(recording)
    cells = _cells(recording)
    if first is None:
        return cells
    known = {site: {layer: r for layer, r in row.items() if r.order <= first.order} for site, row in cells.items()}
    return {site: row for site, row in known.items() if row}


def _records(cells: Cells) -> list[Record]:
    return [record for row in cells.values() for record in row.values()]


def _layers(cells: Cells) -> int:
    return max(layer for row in cells.values() for layer in row) + 1


def _apart(ours: Cells, theirs: Cells) -> float | None:
    """The largest difference of headroom among the sites that both runs have, in bits; None for none."""
    differences = [
        abs(math.log2(record.amax / other.amax))
        for site, row in ours.items()
        for layer, record in row.items()
        if (other := theirs.get(site, {}).get(layer)) is not None and record.amax and other.amax
    ]
    return max(differences, default=None)


def _headroom(record: Record | None, form: NumberFormat) -> float:
    """Bits of `form`; -inf for a tensor that lost elements, NaN for one that is not there, inf for zeros."""
    if record is None or (record.amax is None and not record.lost):
        return math.nan
    return -math.inf if record.lost or record.amax is None else form.headroom(record.amax)


def _site_map(group: Group, recording: Recording) -> Figure:
    cells, dtype = _cells(recording), recording.header.dtype
    records = _records(cells)
    finite = [room for record in records if math.isfinite(room := _headroom(record, group.form))]
    spread = f"Headroom runs from {bits(min(finite))} to {bits(max(finite))} bits. " if finite else ""
    sentence = choose.break_sentence(recording)
    return Figure(
        name=f"headroom-{dtype}-{group.slug}",
        title=f"Headroom in {group.form.name}, layer × site, {dtype} run: {group.name}",
        caption=(
            "Sites in order of execution, from the bottom up; those stored in the run's dtype, so not the insides of "
            "RMSNorm and softmax, which are computed in float32. "
            + (
                f"{sentence}; what comes later in this run is not the model's doing."
                if sentence
                else "This run did not break."
            )
        ),
        alt=(
            f"A heat map of {len(cells)} sites over {_layers(cells)} layers. {spread}"
            f"{sum(room < 0 for room in finite)} cells are below 0, "
            f"{sum(record.lost > 0 for record in records)} hold inf or NaN."
        ),
        draw=functools.partial(_draw_sites, cells=cells, form=group.form),
        size=(8.0, max(3.0, 1.3 + 0.2 * len(cells))),
    )


def _draw_sites(figure: "matplotlib.figure.Figure", cells: Cells, form: NumberFormat) -> Sequence[Hover]:
    axes = figure.add_subplot()
    rows, layers = list(cells.values()), range(_layers(cells))
    names = [places.kind(next(iter(row.values()))) for row in rows]

    def hover(row: int, layer: int) -> str:
        record = rows[row].get(layer)
        return f"layer {layer}, {names[row]}: not recorded" if record is None else _said(record, form)

    hovers = heat_map(
        axes,
        [[_headroom(row.get(layer), form) for layer in layers] for row in rows],
        rows=names,
        columns=[str(layer) for layer in layers],
        label=f"headroom in {form.name} [bits]",
        hover=hover,
        limit=0,
    )
    axes.set_xlabel("layer")
    return hovers


def _said(record: Record, form: NumberFormat) -> str:
    if record.lost:
        return f"{place(record)}: {record.lost:,} of {record.elements:,} elements are inf or NaN"
    if record.amax is None:
        return f"{place(record)}: no element that a mask leaves"
    where = at_token(record.amax_position, record.amax_token_text)
    return f"{place(record)}: {bits(_headroom(record, form))} bits, largest {number(record.amax)}{where}"


def _table(group: Group) -> Table:
    tops = []
    for site, row in _known(group.widest).items():
        top = max(row.values(), key=lambda record: choose.magnitude(record) or 0.0)
        if size := choose.magnitude(top):
            tops.append((site, top, size))
    formats = map(number_format, dict.fromkeys([group.form.name, *group.widest.header.formats]))
    return table(
        f"headroom-{group.slug}",
        f"Least headroom of each site, {group.widest.header.dtype} run: {group.name}",
        sorted(tops, key=lambda row: -row[2]),
        [
            (Column("site"), lambda row: places.kind(row[1])),
            (Column("path in the layer"), lambda row: row[0]),
            (Column("layer"), lambda row: row[1].layer),
            (Column("largest"), lambda row: row[2]),
            (Column("position"), lambda row: choose.peak_token(group.widest, row[1])[0]),
            (Column("token"), lambda row: choose.peak_token(group.widest, row[1])[1]),
            *(
                (Column(form.name, unit="bits", format=bits), lambda row, form=form: form.headroom(row[2]))
                for form in formats
            ),
        ],
        note="In the layer where the site's largest magnitude is greatest; headroom in each format's own bits. Of a "
        "run that broke: up to its break, whose value counts though it did not fit.",
    )


def _residual_by_position(recording: Recording) -> dict[int, Record]:
    """By layer the residual stream after it, where peaks by position were kept and nothing had broken yet."""
    found = places.at(choose.intact(recording), places.AFTER_MLP)
    return {layer: record for layer, record in sorted(found.items()) if record.position_amax and record.positions}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bin:
    """Neighbouring positions, `first` to `last`; the largest magnitude among them is at `position` of `row`."""

    first: int
    last: int
    amax: float
    row: int
    position: int


def _bins(record: Record) -> list[_Bin]:
    """A layer's peaks by position, over all rows, in so few bins that each can be seen."""
    peaks, positions = record.position_amax or (), record.positions or 0
    width = max(math.ceil(positions / _MOST_COLUMNS), 1)
    found = []
    for first in range(0, positions, width):
        last = min(first + width, positions) - 1
        inside = (at for start in range(0, len(peaks), positions) for at in range(start + first, start + last + 1))
        top = max(inside, key=peaks.__getitem__)
        found.append(_Bin(first=first, last=last, amax=peaks[top], row=top // positions, position=top % positions))
    return found


def _position_map(group: Group, residual: Mapping[int, Record]) -> Figure:
    recording = group.widest
    rows = {layer: _bins(record) for layer, record in residual.items()}
    layer, top = max(((layer, part) for layer, row in rows.items() for part in row), key=lambda pair: pair[1].amax)
    width = top.last - top.first + 1
    return Figure(
        name=f"headroom-by-position-{group.slug}",
        title=f"Headroom in {group.form.name}, layer × position, {recording.header.dtype} run: {group.name}",
        caption=(
            "The residual stream after each layer."
            + (f" A cell is the least headroom among {width} neighbouring positions." if width > 1 else "")
        ),
        alt=(
            f"A heat map of {len(rows)} layers over {counted(residual[layer].positions or 0, 'position')}. The least "
            f"headroom is {bits(group.form.headroom(top.amax))} bits, after layer {layer}{_where(recording, top)}."
        ),
        draw=functools.partial(_draw_positions, recording=recording, rows=rows, form=group.form),
        size=(8.0, max(3.0, 1.3 + 0.16 * len(rows))),
    )


def _draw_positions(
    figure: "matplotlib.figure.Figure", recording: Recording, rows: Mapping[int, Sequence[_Bin]], form: NumberFormat
) -> Sequence[Hover]:
    axes = figure.add_subplot()
    layers, grid = list(rows), list(rows.values())

    def hover(row: int, column: int) -> str:
        part = grid[row][column]
        room = bits(form.headroom(part.amax))
        return f"after layer {layers[row]}{_where(recording, part)}: {room} bits, largest {number(part.amax)}"

    hovers = heat_map(
        axes,
        [[form.headroom(part.amax) for part in row] for row in grid],
        rows=[str(layer) for layer in layers],
        columns=[str(part.first) for part in grid[0]],
        label=f"headroom in {form.name} [bits]",
        hover=hover,
        limit=0,
    )
    axes.set_xlabel("position [tokens]")
    axes.set_ylabel("after layer")
    return hovers


def _where(recording: Recording, part: _Bin) -> str:
    tokens = recording.header.tokens
    text = None if tokens is None else recording.header.text_of(tokens[part.row][part.position])
    return at_token(part.position, text)
