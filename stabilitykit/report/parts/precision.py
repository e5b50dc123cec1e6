"""Where a run is least precise, against one in a wider dtype: the tensors that rounding has changed most."""

from stabilitykit.records import Record, Recording
from stabilitykit.report.blocks import Column, Table
from stabilitykit.report.parts.places import kind
from stabilitykit.report.style import decibel
from stabilitykit.report.tables import table
from stabilitykit.words import number, place

_MOST = 6


def least_precise(recording: Recording, reference: str) -> Table | None:
    """The lowest SQNR of each kind of tensor, the least precise kinds first.

    None where nothing was compared with `reference`, the dtype of the other run, and where the run broke: what comes
    after a break says nothing of precision.
    """
    if recording.first_break() is not None:
        return None
    compared = [one for one in recording if one.is_stored_in(recording.header.dtype) and sqnr(one) is not None]
    worst: dict[str, Record] = {}
    for record in sorted(compared, key=sqnr):  # type: ignore[arg-type]  # None is left out
        worst.setdefault(kind(record), record)
    if not worst:
        return None
    return table(
        "least-precise",
        f"{recording.header.dtype} against {reference}, least precise first",
        list(worst.values())[:_MOST],
        [
            (Column("SQNR", unit="dB", format=decibel), sqnr),
            (Column("largest error", unit="ulp", format=number), _ulp),
            (Column("tensor"), place),
            (Column("site"), lambda row: row.site),
        ],
        note="The worst of each kind of tensor. SQNR: the power of the numbers over that of their error; 6 dB are "
        "one bit, and more is better. Errors add up along the model.",
    )


def sqnr(record: Record) -> float | None:
    """In dB, as `Deviation` has it; None where nothing was compared."""
    return None if record.deviation is None else record.deviation.sqnr


def _ulp(record: Record) -> float | None:
    return None if record.deviation is None else record.deviation.largest_ulp
