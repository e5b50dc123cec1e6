"""Recorded runs as the explorer reads them: columns, a number for each record."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stabilitykit.diagnosis.layers import stored
from stabilitykit.formats import NumberFormat
from stabilitykit.records import FormatCounts, Record, Recording
from stabilitykit.records.lengths import Span
from stabilitykit.report.explorer.numbers import BY_POSITION, differences, in_steps, short
from stabilitykit.report.explorer.rows import Key, Texts, key_of, rows_of
from stabilitykit.report.parts.choose import Group
from stabilitykit.report.words import happened
from stabilitykit.words import at_token


def run_group(group: Group, kept: Mapping[str, Sequence[Record]], form: NumberFormat, texts: Texts) -> dict[str, Any]:
    """`kept` are the records of each dtype's run that the page carries."""
    numbers, rows = rows_of(kept.values(), texts)
    first: _Profiles = {}
    return {
        "name": group.name,
        "kind": "run",
        "rows": rows,
        "runs": [
            _run(dtype, group.runs[dtype], records, numbers, _profiles(group.runs[dtype], records, first, form), texts)
            for dtype, records in kept.items()
        ],
    }


def worst_steps(run: Recording) -> list[Record]:
    """Of each site the step at which it broke first, else lost elements, else was largest; in order of execution."""
    worst: dict[str, Record] = {}
    for record in run:
        known = worst.get(record.site)
        if known is None or (known.broke is None and _severity(record) > _severity(known)):
            worst[record.site] = record
    return sorted(worst.values(), key=lambda record: record.order)


def _severity(record: Record) -> tuple[bool, bool, float]:
    return record.broke is not None, record.lost > 0, record.amax or 0.0


def _run(
    dtype: str,
    run: Recording,
    records: Sequence[Record],
    rows: Mapping[Key, int],
    profiles: Mapping[int, list[int]],
    texts: Texts,
) -> dict[str, Any]:
    header = run.header
    judged = {id(record) for record in stored(run)}
    shown = [int(id(record) in judged or record.is_gradient) for record in records]
    tokens = header.tokens[0] if header.tokens is not None and header.rows == 1 else None

    def some(value: Callable[[Record], Any]) -> dict[int, Any]:
        """By the number of the record, where there is something to say."""
        found = ((index, value(record)) for index, record in enumerate(records))
        return {index: said for index, said in found if said}

    return {
        "dtype": dtype,
        "broken": any(record.broke is not None for record in records),
        "rows": header.rows,
        "tokens": None if tokens is None else [header.text_of(token) or f"(id {token})" for token in tokens],
        "starts": list(header.starts),
        "formats": list(header.formats),
        "statistics": dict(header.statistics),
        "row": [rows[key_of(record)] for record in records],
        "layer": [-1 if record.layer is None else record.layer for record in records],
        "order": differences([record.order for record in records]),
        "step": [record.step for record in records],
        "site": [texts.number(record.site) for record in records],
        "operator": [texts.number(record.operator) for record in records],
        "type": [texts.number(record.dtype) for record in records],
        "shape": [texts.number(" × ".join(map(str, record.shape)) or "scalar") for record in records],
        "judged": shown,
        "elements": [record.elements for record in records],
        "zero": [record.zero for record in records],
        "subnormal": [record.subnormal for record in records],
        "least": [short(record.minimum, 6) for record in records],
        "most": [short(record.maximum, 6) for record in records],
        "amax": some(_amax),
        "smallest": [short(record.smallest) for record in records],
        "mean": [short(record.mean) for record in records],
        "rms": [short(record.rms) for record in records],
        "first": [record.exponent_first for record in records],
        "exponents": [record.exponents if flag else () for record, flag in zip(records, shown, strict=True)],
        "casts": [
            [
                number
                for name in header.formats
                for counts in (record.formats.get(name, FormatCounts(0, 0, 0)),)
                for number in (counts.overflow, counts.subnormal, counts.zero)
            ]
            if flag
            else []
            for record, flag in zip(records, shown, strict=True)
        ],
        "at": [
            [-1 if at is None else at for at in (record.amax_row, record.amax_position, record.amax_channel)]
            for record in records
        ],
        "token": [texts.number(record.amax_token_text) for record in records],
        "profile": profiles,
        "positions": [record.positions or 0 for record in records],
        "lost": some(lambda r: r.lost and [r.nan, r.positive_inf, r.negative_inf, r.lost_positions, r.lost_channels]),
        "masked": some(lambda record: record.masked),
        "absorbs": some(lambda record: int(record.absorbs)),
        "softmax": some(_softmax),
        "deviation": some(_deviation),
        "breaks": some(lambda record: _break(record, run)),
        "extra": some(lambda record: [short(value) for value in record.extra.values()]),
    }


_Profiles = dict[tuple[Key, int | None, int, int], npt.NDArray[np.int64]]


def _profiles(run: Recording, records: Sequence[Record], first: _Profiles, form: NumberFormat) -> dict[int, list[int]]:
    """By the number of the record, the largest finite magnitude at each position over all rows, in steps.

    Of tensors that a run stores in its dtype. What another dtype's run in `first` has of the same site is taken off:
    most of the rest is zeros.
    """
    judged = {id(record) for record in stored(run)}
    found: dict[int, list[int]] = {}
    for index, record in enumerate(records):
        if not record.position_amax or not record.positions or id(record) not in judged:
            continue
        peaks = np.array(record.position_amax).reshape(-1, record.positions).max(axis=0)
        steps = in_steps(peaks, BY_POSITION, form)
        place = (key_of(record), record.layer, record.step, record.positions)
        base = first.setdefault(place, steps)
        found[index] = (steps if base is steps else steps - base).tolist()
    return found


def _amax(record: Record) -> int | float | None:
    """The largest magnitude, where it is not that of the minimum or the maximum."""
    ends = [abs(end) for end in (record.minimum, record.maximum) if end is not None]
    return None if record.amax is None or record.amax == max(ends, default=None) else short(record.amax, 6)


def _softmax(record: Record) -> list[Any] | None:
    found = record.softmax
    if found is None:
        return None
    known = [value for value in found.entropy_mean if not math.isnan(value)]
    least = [value for value in found.entropy_min if not math.isnan(value)]
    return [
        short(found.max_logit, 6),
        short(found.logit_range, 6),
        short(min(least, default=None)),
        short(sum(known) / len(known) if known else None),
        short(found.max_probability),
        short(found.sum_error),
        short(found.underflow_share),
        found.masked_rows,
        found.nan_rows,
        int(found.recomputed),
    ]


def _deviation(record: Record) -> list[Any] | None:
    found = record.deviation
    return None if found is None else [short(found.sqnr), short(found.largest), short(found.largest_ulp)]


def _break(record: Record, run: Recording) -> dict[str, Any] | None:
    broke = record.broke
    if broke is None:
        return None
    span = Span(
        first=1, last=1, run=1, site=record.site, label=record.label, layer=record.layer, operator=record.operator,
        order=record.order, token_text=run.header.text_of(broke.token), broke=broke,
    )  # fmt: skip
    where = at_token(broke.position, span.token_text)
    channel = "" if broke.channel is None else f", channel {broke.channel}"
    return {
        "kind": broke.kind,
        "said": happened(span, run.header.dtype).replace("`", ""),
        "where": f"{where}{channel}".removeprefix(", "),
        "count": broke.count,
        "positions": list(broke.positions) or ([] if broke.position is None else [broke.position]),
        "operands": [[short(value, 9), site] for value, site in zip(broke.operands, broke.operand_sites, strict=False)],
    }
