"""What other formats would make of the runs that stayed finite."""

from collections.abc import Iterator, Sequence

from stabilitykit.diagnosis.forecast import Forecast, forecast, prediction
from stabilitykit.formats import number_format
from stabilitykit.records import Recording
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Cell, Column, Prose, Section, Table
from stabilitykit.report.parts import choose
from stabilitykit.report.parts.choose import Group
from stabilitykit.report.style import bits, share

KEY, TITLE = "forecast", "Forecast for other formats"

OPENING = (
    "What storing the tensors of a float32 run in a narrower format would come to, from exact counts against its "
    "limits, rounding ties included. Judged are the tensors that a float16 run stores in 16 bits; of an inference that "
    "keeps its activations in float8, the same ones. After a first overflow nothing is what it would have been, so the "
    "counts past a range say how far out it lies, not what a run would lose."
)


def section(results: Results) -> Section:
    """The forecasts of the chosen groups in words, and those of every float32 run in a table."""
    every = [(group, run) for group in choose.groups(results) if (run := _judged(group)) is not None]
    if not every:
        return choose.nothing(KEY, TITLE, results, what="a finite float32 run that says what is stored in 16 bits")
    blocks: list[Block] = []
    for group in choose.chosen(results):
        run = _judged(group)
        if run is not None:
            said = " ".join(prediction(run, one) for one in _forecasts(run))
            blocks.append(Prose(f"**{group.name}**: {said}"))
    rows = [_row(group, one) for group, run in every for one in _forecasts(run)]
    blocks.append(_table(rows))
    return Section(key=KEY, title=TITLE, opening=choose.opening(results, OPENING), blocks=blocks)


def _judged(group: Group) -> Recording | None:
    run = group.reference
    if run is None or run.first_break() is not None or all(record.stored_dtype is None for record in run):
        return None
    return run


def _forecasts(run: Recording) -> Iterator[Forecast]:
    """Of the formats that the run counted for and that are narrower than its own."""
    own = number_format(run.header.dtype).bits
    return (forecast(run, name) for name in run.header.formats if number_format(name).bits < own)


def _row(group: Group, one: Forecast) -> list[Cell]:
    first = one.first
    return [
        group.name,
        one.format,
        None if first is None else choose.place(first),
        None if first is None else first.amax_token_text,
        one.overflow if first is not None else None,
        one.past,
        one.subnormal / one.elements if one.elements else None,
        one.zero / one.elements if one.elements else None,
        one.headroom,
        None if one.closest is None else choose.place(one.closest),
    ]


def _table(rows: Sequence[Sequence[Cell]]) -> Table:
    return Table(
        name="forecast",
        title="What each format would make of every float32 run",
        columns=[
            Column(name="run"),
            Column(name="format"),
            Column(name="would break first in"),
            Column(name="largest at"),
            Column(name="elements past the range there"),
            Column(name="in all"),
            Column(name="subnormal", format=share),
            Column(name="to zero", format=share),
            Column(name="least headroom", unit="bits", format=bits),
            Column(name="in"),
        ],
        rows=rows,
        note="A dash: it would hold. Shares are of all elements of the judged tensors that no mask hides.",
    )
