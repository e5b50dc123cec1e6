"""One recording as tables: by layer, and by step where it is a generation."""

from functools import partial

from stabilitykit.diagnosis.layers import LayerRow, StepRow, by_layer, by_step
from stabilitykit.records import Recording
from stabilitykit.report.blocks import Column, Table
from stabilitykit.report.style import bits
from stabilitykit.report.tables import some, table
from stabilitykit.words import number, place, quoted

LEGEND = (
    "amax: largest finite magnitude stored in the dtype. headroom: bits between it and the dtype's maximum; with less "
    "than 1, a value twice as large overflows. subnormal, lost (inf or NaN), > float16 (overflow float16): elements. "
    "entropy: of the softmax, mean over heads and rows, in nats."
)


def layers(recording: Recording, form: str = "float16") -> Table:
    """A row for each layer; elements that overflow `form` are counted if the run's dtype is another."""
    dtype, rows = recording.header.dtype, by_layer(recording, form)
    return table(
        "by-layer",
        f"{dtype}, by layer",
        rows,
        [
            (Column("layer"), lambda row: row.name),
            (Column("amax", format=number), lambda row: row.amax),
            (Column("headroom", format=bits), lambda row: row.headroom),
            (Column("subnormal", format=some), lambda row: row.subnormal),
            (Column("entropy", format=lambda value: f"{value:.2f}"), lambda row: row.entropy_mean),
            *([(Column("lost", format=some), lambda row: row.lost)] if any(row.lost for row in rows) else []),
            *([(Column(f"> {form}", format=some), lambda row: row.past)] if dtype != form else []),
            *((Column(name, unit=unit), partial(_extra, name)) for name, unit in recording.header.statistics.items()),
            (Column("amax is in"), _where),
        ],
        alarming=lambda row: row.lost > 0,
    )


def _extra(name: str, row: LayerRow) -> float | None:
    """The largest of a user's own statistic among the layer's tensors."""
    return row.extra[name]


def _where(row: LayerRow) -> str | None:
    if row.site is None:
        return None
    at = row.position if row.token is None else quoted(row.token)
    return f"{row.label or row.site}" + ("" if row.position is None else f", {at}")


def steps(recording: Recording) -> Table | None:
    """The steps of a generation at which the largest value so far grew or elements were lost, and the last one.

    None for a single step.
    """
    every = by_step(recording)
    if len(every) < 2:
        return None
    shown: list[StepRow] = []
    for row in every:
        grew = not shown or (row.amax or 0.0) > max(other.amax or 0.0 for other in shown)
        if grew or row.lost or row is every[-1]:
            shown.append(row)
    return table(
        "by-step",
        f"{recording.header.dtype}, by step: {len(every)} steps; the largest value grew at these",
        shown,
        [
            (Column("step"), lambda row: row.step),
            (Column("token"), lambda row: "prompt" if row.step == 0 else row.token and quoted(row.token)),
            (Column("position"), lambda row: row.position),
            (Column("amax", format=number), lambda row: row.amax),
            (Column("headroom", format=bits), lambda row: row.headroom),
            (Column("lost", format=some), lambda row: row.lost),
            (Column("amax is in"), lambda row: None if row.site is None else place(row)),
        ],
        alarming=lambda row: row.lost > 0,
    )
