"""Records -> the JSON that the explorer reads: short names, columns instead of rows, no more digits than are shown.

Magnitudes have six digits, other statistics four, counts are exact. Exponents, and what casts would do, are told of
what the model stores in the run's dtype, not of what it computes in float32 on purpose. A magnitude by position is kept
as a sixteenth of a power of two, so within 2.2%, and always on the side of the format's maximum on which it was; one by
length as a 32nd, within 1.1%. Text is what the records hold: of a redacted run there is none.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.records.sweep import Results
from stabilitykit.report.explorer.classes import CLASSES
from stabilitykit.report.explorer.lengths import length_group, length_groups
from stabilitykit.report.explorer.numbers import BY_LENGTH, BY_POSITION, NOTHING, short
from stabilitykit.report.explorer.rows import Texts
from stabilitykit.report.explorer.runs import run_group, worst_steps
from stabilitykit.report.parts import choose
from stabilitykit.report.style import INK, dtype_style
from stabilitykit.words import counted

MOST = 24_000
"""Records that a page carries, some 2 MB. Past it runs in several steps keep each site's worst step, and of these runs
the plan's first are in the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explored:
    """`document` is the JSON.

    `records` is how many are in it, `left_out` how many are not; `brief`, of each site the worst step alone is. `maps`
    counts the texts of which every length is in it.
    """

    document: str
    records: int
    left_out: int
    brief: bool
    maps: int


def explored(results: Results) -> Explored | None:
    """All finished runs and maps of lengths; None where there are none."""
    groups = choose.groups(results)
    found = sum(len(run) for group in groups for run in group.runs.values())
    brief = found > MOST
    texts = Texts()
    parts: list[dict[str, Any]] = []
    kept = 0
    for group in groups:
        records = {dtype: worst_steps(run) if brief else run.records for dtype, run in group.runs.items()}
        size = sum(map(len, records.values()))
        if kept + size <= MOST or not kept:
            kept += size
            parts.append(run_group(group, records, results.form, texts))
    maps = length_groups(results)
    parts += [length_group(name, runs, results.form, texts) for name, runs in maps]
    parts = [part for part in parts if part["runs"] and part["rows"]]
    if not parts:
        return None
    keys: dict[str, int] = {}
    for part in parts:
        key = re.sub(r"[^A-Za-z0-9]+", "-", part["name"]).strip("-").lower()[:60] or "run"
        keys[key] = keys.get(key, 0) + 1
        part["key"] = key if keys[key] == 1 else f"{key}-{keys[key]}"
    document = {
        "form": results.form.name,
        "formats": [_format(form) for form in _formats(results, groups)],
        "steps": {"run": BY_POSITION, "lengths": BY_LENGTH},
        "nothing": NOTHING,
        "classes": [{"key": c.key, "label": c.label, "least": short(c.least)} for c in CLASSES],
        "start": _start(parts, results.form.name),
        "groups": parts,
        "texts": texts.all,
    }
    return Explored(
        document=json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False),
        records=kept,
        left_out=found - kept,
        brief=brief,
        maps=len(maps),
    )


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
        "edge": short(edge),
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


def told(found: Explored) -> str:
    """What is in it, in a sentence."""
    parts = [counted(found.records, "record")] if found.records else []
    parts += [f"every length of {counted(found.maps, 'text')}"] if found.maps else []
    said = f"The explorer holds {' and '.join(parts)}."
    if found.left_out:
        more = counted(found.left_out, "record")
        said += f" {more} more are in the files of the sweep alone, for a page would be too large"
        said += "; of each site it has the worst step." if found.brief else "."
    return said
