"""Every length of a text as the explorer reads it: where each site's largest magnitude grows, and the first breaks."""

from collections.abc import Mapping, Sequence
from typing import Any

from stabilitykit.formats import NumberFormat
from stabilitykit.records.lengths import LengthMap, Peak, Span
from stabilitykit.records.sweep import USUAL, Results
from stabilitykit.report.explorer.numbers import BY_LENGTH, differences, in_steps
from stabilitykit.report.explorer.rows import Key, Texts, key_of, rows_of
from stabilitykit.report.words import happened
from stabilitykit.words import at_token, place, with_bos


def length_groups(results: Results) -> list[tuple[str, dict[str, LengthMap]]]:
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


def length_group(name: str, runs: Mapping[str, LengthMap], form: NumberFormat, texts: Texts) -> dict[str, Any]:
    """One text in each of its dtypes."""
    curves = {dtype: _curves(run) for dtype, run in runs.items()}
    numbers, rows = rows_of([[peaks[0] for peaks in every] for every in curves.values()], texts)
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
    rows: Mapping[Key, int],
    form: NumberFormat,
    texts: Texts,
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
        "row": [rows[key_of(peak)] for peak in firsts],
        "layer": [-1 if peak.layer is None else peak.layer for peak in firsts],
        "order": differences([peak.order for peak in firsts]),
        "site": [texts.number(peak.site) for peak in firsts],
        "grows": [len(peaks) for peaks in curves],
        "positions": [step for peaks in curves for step in differences([peak.position for peak in peaks])],
        "peaks": differences(in_steps([peak.amax for peak in every], BY_LENGTH, form).tolist()),
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
