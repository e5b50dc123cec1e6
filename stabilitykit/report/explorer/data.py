"""Records -> the JSON that the explorer reads: short names, columns instead of rows, no more digits than are shown.

Magnitudes have six digits, other statistics four, counts are exact. Exponents, and what casts would do, are told of
what the model stores in the run's dtype, not of what it computes in float32 on purpose. A magnitude by position is kept
as a sixteenth of a power of two, so within 2.2%, and always on the side of the format's maximum on which it was; one by
length as a 32nd, within 1.1%. Text is what the records hold: of a redacted run there is none.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from stabilitykit.diagnosis.layers import stored
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records import FormatCounts, Record, Recording
from stabilitykit.records.layers import layer_of
from stabilitykit.records.lengths import LengthMap, Peak, Span
from stabilitykit.records.sweep import USUAL, Results
from stabilitykit.report.explorer.classes import CLASSES
from stabilitykit.report.parts import choose, places
from stabilitykit.report.style import INK, dtype_style
from stabilitykit.report.words import happened
from stabilitykit.words import at_token, counted, place, with_bos

MOST = 24_000
"""Records that a page carries. Past it a run that was recorded in steps keeps each site's worst step."""

_BY_POSITION, _BY_LENGTH = 16, 32  # steps to a power of two
_NOTHING = -9999  # the step of a magnitude that is zero, or not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Explored:
    """`document` is the JSON. `records` is how many are in it, `left_out` how many are not, `maps` counts the texts of
    which every length is in it."""

    document: str
    records: int
    left_out: int
    maps: int


def explored(results: Results) -> Explored | None:
    """All finished runs and maps of lengths; None where there are none."""
    groups = choose.groups(results)
    found = sum(len(run) for group in groups for run in group.runs.values())
    brief = found > MOST
    texts = _Texts()
    parts = [_run_group(group, results.form, texts, brief=brief) for group in groups]
    maps = _length_groups(results)
    parts += [_length_group(name, runs, results.form, texts) for name, runs in maps]
    parts = [part for part in parts if part["runs"] and part["rows"]]
    if not parts:
        return None
    keys: dict[str, int] = {}
    for part in parts:
        key = re.sub(r"[^A-Za-z0-9]+", "-", part["name"]).strip("-").lower()[:60] or "run"
        keys[key] = keys.get(key, 0) + 1
        part["key"] = key if keys[key] == 1 else f"{key}-{keys[key]}"
    kept = sum(len(run["row"]) for part in parts if part["kind"] == "run" for run in part["runs"])
    document = {
        "form": results.form.name,
        "formats": [_format(form) for form in _formats(results, groups)],
        "steps": {"run": _BY_POSITION, "lengths": _BY_LENGTH},
        "nothing": _NOTHING,
        "classes": [{"key": c.key, "label": c.label, "least": _number(c.least)} for c in CLASSES],
        "start": _start(parts, results.form.name),
        "groups": parts,
        "texts": texts.all,
    }
    return Explored(
        document=json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False),
        records=kept,
        left_out=found - kept,
        maps=len(maps),
    )


@dataclass(slots=True)
class _Texts:
    """Strings by number, each kept once."""

    all: list[str] = field(default_factory=list)
    _known: dict[str, int] = field(default_factory=dict)

    def number(self, text: str | None) -> int:
        """-1 for None."""
        if text is None:
            return -1
        if text not in self._known:
            self._known[text] = len(self.all)
            self.all.append(text)
        return self._known[text]


def _formats(results: Results, groups: Sequence[choose.Group]) -> list[NumberFormat]:
    names = [results.form.name]
    for group in groups:
        for run in group.runs.values():
            names += [*run.header.formats, run.header.dtype]
    names += [length_map.header.dtype for _, length_map in results.length_maps()]
    return [number_format(name) for name in dict.fromkeys(names)]


_DASHES = {"-": [100, 0], "--": [6, 3], "-.": [7, 3, 2, 3], ":": [2, 3]}


def _format(form: NumberFormat) -> dict[str, Any]:
    edge, tie = form.overflow_edge
    look = dtype_style(form.name)
    return {
        "name": form.name,
        "largest": form.largest,
        "normal": form.smallest_normal,
        "subnormal": form.smallest_subnormal,
        "edge": _number(edge),
        "tie": tie,
        "colour": None if look["color"] == INK else look["color"],
        "dash": _DASHES.get(look["linestyle"]) or list(look["linestyle"][1]),
    }


def _start(parts: Sequence[Mapping[str, Any]], form: str) -> list[int]:
    """The group and the run to begin with: the first that breaks in `form`, else that breaks, else the first."""
    runs = [(g, r, run) for g, part in enumerate(parts) for r, run in enumerate(part["runs"])]
    for wanted in (
        [(g, r) for g, r, run in runs if run["broken"] and run["dtype"] == form],
        [(g, r) for g, r, run in runs if run["broken"]],
    ):
        if wanted:
            return list(wanted[0])
    return [0, 0]


# The rows of a map


_Key = tuple[str, str, bool]  # the stack of layers, the site as each layer has it, whether it is outside the layers


def _key(record: Record | Peak) -> _Key:
    return _key_of(record.site, record.layer)


@cache
def _key_of(site: str, layer: int | None) -> _Key:
    found = None if layer is None else layer_of(site.partition("/")[0])
    return ("" if found is None else found[0], places.relative_site(site, layer), layer is None)


def _rows(runs: Iterable[Iterable[Record | Peak]], texts: _Texts) -> tuple[dict[_Key, int], list[list[int]]]:
    """Every run's sites in the order of execution, and each as [stack, label, path, 1 outside the layers]."""
    order: list[_Key] = []
    labels: dict[_Key, str | None] = {}
    for run in runs:
        own: dict[_Key, None] = {}
        for record in run:
            key = _key(record)
            own.setdefault(key)
            if labels.get(key) is None:
                labels[key] = record.label
        order = _merged(order, list(own))
    several = len({stack for stack, _, outside in order if not outside}) > 1
    rows = [
        [texts.number(stack if several else ""), texts.number(labels[key]), texts.number(path), int(outside)]
        for key in order
        for stack, path, outside in (key,)
    ]
    return {key: number for number, key in enumerate(order)}, rows


def _merged(order: list[_Key], own: Sequence[_Key]) -> list[_Key]:
    """`order` with what only `own` has put behind the neighbour that it follows there."""
    if not order:
        return list(own)
    known = set(order)
    after: dict[_Key | None, list[_Key]] = {}
    last: _Key | None = None
    for key in own:
        if key in known:
            last = key
        else:
            after.setdefault(last, []).append(key)
    merged = list(after.get(None, ()))
    for key in order:
        merged += [key, *after.get(key, ())]
    return merged


# Recorded runs


def _run_group(group: choose.Group, form: NumberFormat, texts: _Texts, *, brief: bool) -> dict[str, Any]:
    runs = {dtype: _kept(run, brief=brief) for dtype, run in group.runs.items()}
    numbers, rows = _rows(runs.values(), texts)
    first: _Profiles = {}
    return {
        "name": group.name,
        "kind": "run",
        "rows": rows,
        "runs": [
            _run(dtype, group.runs[dtype], records, numbers, _profiles(group.runs[dtype], records, first, form), texts)
            for dtype, records in runs.items()
        ],
    }


def _kept(run: Recording, *, brief: bool) -> list[Record]:
    if not brief:
        return run.records
    worst: dict[str, Record] = {}
    for record in run:
        known = worst.get(record.site)
        if known is None or _severity(record) > _severity(known):
            worst[record.site] = record
    return sorted(worst.values(), key=lambda record: record.order)


def _severity(record: Record) -> tuple[bool, bool, float]:
    return record.broke is not None, record.lost > 0, record.amax or 0.0


def _run(
    dtype: str,
    run: Recording,
    records: Sequence[Record],
    rows: Mapping[_Key, int],
    profiles: Mapping[int, list[int]],
    texts: _Texts,
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
        "row": [rows[_key(record)] for record in records],
        "layer": [-1 if record.layer is None else record.layer for record in records],
        "order": _differences([record.order for record in records]),
        "step": [record.step for record in records],
        "site": [texts.number(record.site) for record in records],
        "operator": [texts.number(record.operator) for record in records],
        "type": [texts.number(record.dtype) for record in records],
        "shape": [texts.number(" × ".join(map(str, record.shape)) or "scalar") for record in records],
        "judged": shown,
        "elements": [record.elements for record in records],
        "zero": [record.zero for record in records],
        "subnormal": [record.subnormal for record in records],
        "least": [_number(record.minimum, 6) for record in records],
        "most": [_number(record.maximum, 6) for record in records],
        "amax": some(_amax),
        "smallest": [_number(record.smallest) for record in records],
        "mean": [_number(record.mean) for record in records],
        "rms": [_number(record.rms) for record in records],
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
        "extra": some(lambda record: [_number(value) for value in record.extra.values()]),
    }


def _differences(values: Sequence[int]) -> list[int]:
    """Each number less the one before it: small numbers take little room."""
    return [*values[:1], *(later - earlier for earlier, later in pairwise(values))]


_Profiles = dict[tuple[_Key, int | None, int, int], npt.NDArray[np.int64]]


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
        steps = _in_steps(peaks, _BY_POSITION, form)
        place = (_key(record), record.layer, record.step, record.positions)
        base = first.setdefault(place, steps)
        found[index] = (steps if base is steps else steps - base).tolist()
    return found


def _in_steps(values: npt.ArrayLike, steps: int, form: NumberFormat) -> npt.NDArray[np.int64]:
    """log2 in so many steps to a power of two, on the side of `form`'s maximum on which the value is."""
    magnitudes = np.asarray(values, dtype=np.float64)
    known = np.isfinite(magnitudes) & (magnitudes > 0)
    found = np.rint(steps * np.log2(np.where(known, magnitudes, 1.0)))
    edge, tie = form.overflow_edge
    if math.isfinite(edge):
        past = magnitudes >= edge if tie else magnitudes > edge
        first = math.ceil(steps * math.log2(edge)) if tie else math.floor(steps * math.log2(edge)) + 1
        found = np.where(past, np.maximum(found, first), np.minimum(found, first - 1))
    return np.where(known, found, _NOTHING).astype(np.int64)


def _amax(record: Record) -> int | float | None:
    """The largest magnitude, where it is not that of the minimum or the maximum."""
    ends = [abs(end) for end in (record.minimum, record.maximum) if end is not None]
    return None if record.amax is None or record.amax == max(ends, default=None) else _number(record.amax, 6)


def _softmax(record: Record) -> list[Any] | None:
    found = record.softmax
    if found is None:
        return None
    known = [value for value in found.entropy_mean if not math.isnan(value)]
    least = [value for value in found.entropy_min if not math.isnan(value)]
    return [
        _number(found.max_logit, 6),
        _number(found.logit_range, 6),
        _number(min(least, default=None)),
        _number(sum(known) / len(known) if known else None),
        _number(found.max_probability),
        _number(found.sum_error),
        _number(found.underflow_share),
        found.masked_rows,
        found.nan_rows,
        int(found.recomputed),
    ]


def _deviation(record: Record) -> list[Any] | None:
    found = record.deviation
    return None if found is None else [_number(found.sqnr), _number(found.largest), _number(found.largest_ulp)]


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
        "operands": [[_number(value), site] for value, site in zip(broke.operands, broke.operand_sites, strict=False)],
    }


# Every length of a text


def _length_groups(results: Results) -> list[tuple[str, dict[str, LengthMap]]]:
    """Maps that differ in dtype and in how far they go alone, by what they are called."""
    found: list[tuple[dict[str, Any], dict[str, LengthMap]]] = []
    for case, length_map in results.length_maps():
        settings = {name: case.settings.get(name) for name in ("prompt", "bos", *USUAL)}
        runs = next((runs for known, runs in found if known == settings and length_map.header.dtype not in runs), None)
        if runs is None:
            runs = {}
            found.append((settings, runs))
        runs[length_map.header.dtype] = length_map
    named = []
    for settings, runs in found:
        longest = max(length_map.longest for length_map in runs.values())
        words = [str(settings["prompt"] or "the prompt"), f"every length to {longest:,}"]
        words += [] if settings["bos"] is None else [with_bos(settings["bos"], mark="")]
        words += [f"{name} {settings[name]}" for name in USUAL if settings[name] not in (None, USUAL[name])]
        named.append((", ".join(words), runs))
    return named


def _length_group(name: str, runs: Mapping[str, LengthMap], form: NumberFormat, texts: _Texts) -> dict[str, Any]:
    curves = {dtype: _curves(run) for dtype, run in runs.items()}
    numbers, rows = _rows([[peaks[0] for peaks in every] for every in curves.values()], texts)
    return {
        "name": name,
        "kind": "lengths",
        "rows": rows,
        "runs": [_length_run(dtype, run, curves[dtype], numbers, form, texts) for dtype, run in runs.items()],
    }


def _curves(found: LengthMap) -> list[list[Peak]]:
    """The growing peaks of each site in each pass, in order of execution."""
    curves: dict[tuple[int, str], list[Peak]] = {}
    for peak in found.peaks:
        curves.setdefault((peak.run, peak.site), []).append(peak)
    return sorted(curves.values(), key=lambda peaks: peaks[0].order)


def _length_run(
    dtype: str,
    found: LengthMap,
    curves: Sequence[Sequence[Peak]],
    rows: Mapping[_Key, int],
    form: NumberFormat,
    texts: _Texts,
) -> dict[str, Any]:
    firsts = [peaks[0] for peaks in curves]
    every = [peak for peaks in curves for peak in peaks]
    header = found.header
    tokens = header.tokens[0] if header.tokens else None
    return {
        "dtype": dtype,
        "broken": found.first_broken is not None,
        "longest": found.longest,
        "tokens": None if tokens is None else [header.text_of(token) or f"(id {token})" for token in tokens],
        "spans": [_span(span, dtype) for span in found.spans],
        "pass": [peak.run for peak in firsts],
        "row": [rows[_key(peak)] for peak in firsts],
        "layer": [-1 if peak.layer is None else peak.layer for peak in firsts],
        "order": _differences([peak.order for peak in firsts]),
        "site": [texts.number(peak.site) for peak in firsts],
        "grows": [len(peaks) for peaks in curves],
        "positions": [step for peaks in curves for step in _differences([peak.position for peak in peaks])],
        "peaks": _differences(_in_steps([peak.amax for peak in every], _BY_LENGTH, form).tolist()),
    }


def _span(span: Span, dtype: str) -> dict[str, Any]:
    made: dict[str, Any] = {"first": span.first, "last": span.last, "pass": span.run}
    if span.broke is not None:
        made |= {
            "site": span.site,
            "order": span.order,
            "place": place(span),
            "said": happened(span, dtype).replace("`", ""),
            "where": at_token(span.broke.position, span.token_text).removeprefix(", "),
        }
    return made


def _number(value: float | None, digits: int = 4) -> Any:
    """A JSON number of so many significant digits; NaN and infinities by name, None as it is."""
    if value is None:
        return None
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    short = float(f"{value:.{digits - 1}e}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def told(found: Explored) -> str:
    """What is in it, in a sentence."""
    parts = [counted(found.records, "record")] if found.records else []
    parts += [f"every length of {counted(found.maps, 'text')}"] if found.maps else []
    said = f"The explorer holds {' and '.join(parts)}."
    if found.left_out:
        said += (
            f" Of runs in several steps it keeps each site's worst step: {counted(found.left_out, 'record')} more "
            "are in the files of the sweep."
        )
    return said
