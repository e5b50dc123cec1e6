"""What other formats would make of the runs that stayed finite."""

from collections.abc import Callable, Iterator, Sequence

from stabilitykit.diagnosis.forecast import Forecast, forecast, overflow_becomes, prediction
from stabilitykit.formats import number_format
from stabilitykit.records import Recording
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Block, Cell, Column, Prose, Section, Table
from stabilitykit.report.parts import choose
from stabilitykit.report.parts.choose import Group
from stabilitykit.report.style import bits, share
from stabilitykit.report.tables import some, table
from stabilitykit.words import counted, place

KEY, TITLE = "forecast", "Forecast for other formats"

OPENING = (
    "What storing the tensors of a float32 run in a narrower format would do, from exact counts against the format's "
    "limits, rounding ties included. Only tensors that a float16 run stores in 16 bits are counted; an inference that "
    "keeps its activations in float8 stores the same ones. After a first overflow every later value would be another, "
    "so counts of overflows say how far out of range a run lies, not what it would lose."
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
    found = [(group.name, one) for group, run in every for one in _forecasts(run)]
    title = "What each format would make of every float32 run"
    blocks.append(_outlook(title, found, [(Column("run"), lambda pair: pair[0])], _PLACES))
    return Section(key=KEY, title=TITLE, opening=choose.opening(results, OPENING), blocks=blocks)


def of_run(recording: Recording, found: Sequence[Forecast]) -> list[Block]:
    """The forecasts of one run: a sentence for each format, and all of them in a table."""
    judged = found[0]
    tensors = f"{counted(judged.judged, 'tensor')} of the {recording.header.dtype} run"
    title = f"What each format would make of {judged.elements:,} elements in {tensors}"
    said = [Prose(prediction(recording, one), tone="bad" if one.breaks else "good") for one in found]
    return [*said, _outlook(title, [("", one) for one in found], [], _WEIGHTS)]


_Outlook = tuple[str, Forecast]
"""The run's name, and one of its forecasts."""

_Columns = list[tuple[Column, Callable[[_Outlook], Cell]]]


def _outlook(title: str, found: Sequence[_Outlook], before: _Columns, after: _Columns) -> Table:
    """A row for each forecast: what would become of the elements, between the other columns."""
    return table(
        "forecast",
        title,
        found,
        [
            *before,
            (Column("format"), lambda pair: pair[1].format),
            (Column("overflow", format=some), lambda pair: pair[1].past),
            (Column("become"), lambda pair: overflow_becomes(pair[1].format, saturating=pair[1].saturating)),
            (Column("subnormal", format=_some_share), lambda pair: _part(pair[1].subnormal, pair[1])),
            (Column("to zero", format=_some_share), lambda pair: _part(pair[1].zero, pair[1])),
            (Column("headroom", unit="bits", format=bits), lambda pair: pair[1].headroom),
            *after,
        ],
        note="Only tensors that a float16 run stores in 16 bits are counted; rounding (including ties) is exact. "
        "Shares are of all elements of these tensors that no mask hides. A dash: none.",
        alarming=lambda pair: pair[1].breaks,
    )


_WEIGHTS: _Columns = [(Column("weights lost", format=some), lambda pair: _lost(pair[1]))]
_PLACES: _Columns = [
    (Column("first overflow"), lambda pair: None if pair[1].first is None else place(pair[1].first)),
    (Column("at token"), lambda pair: None if pair[1].first is None else pair[1].first.amax_token_text),
    (Column("overflows there"), lambda pair: pair[1].overflow if pair[1].first else None),
    (Column("least headroom in"), lambda pair: None if pair[1].closest is None else place(pair[1].closest)),
]


def _some_share(value: float) -> str:
    return share(value) if value else "–"


def _part(count: int, one: Forecast) -> float | None:
    return count / one.elements if one.elements else None


def _lost(one: Forecast) -> int | None:
    return None if one.weights is None else one.weights.zero + (0 if one.saturating else one.weights.overflow)


def _judged(group: Group) -> Recording | None:
    run = group.reference
    if run is None or run.first_break() is not None or all(record.stored_dtype is None for record in run):
        return None
    return run


def _forecasts(run: Recording) -> Iterator[Forecast]:
    """Of the formats that the run counted for and that are narrower than its own."""
    own = number_format(run.header.dtype).bits
    return (forecast(run, name) for name in run.header.formats if number_format(name).bits < own)
