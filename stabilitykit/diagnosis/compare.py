"""Two recordings of the same prompt, site by site: what one has and the other has not, and how far apart they are."""

import math
from collections import Counter
from collections.abc import Iterator

import pandas as pd

from stabilitykit.errors import MisuseError
from stabilitykit.formats import FORMATS, NumberFormat
from stabilitykit.records import Record, Recording

_Key = tuple[int, str, int]
_Pair = tuple[Record | None, Record | None]

_TYPES = {"step": "int64", "layer": "Int64", "row": "int64", "position": "int64", "lost_a": "Int64", "lost_b": "Int64"}
_TEXTS = ("site", "label", "operator", "found", "dtype_a", "dtype_b")


def compare(a: Recording, b: Recording, *, positions: bool = False) -> pd.DataFrame:
    """`a` and `b`, joined by step and site: a row for each tensor that either of them has, in order of execution.

    Of a site that a step has several times the first is joined with the first, the second with the second. Columns:
    `step`, `site`, `label`, `layer`, `operator`; `found`: "both", or "a" or "b" for a site that one of them alone has;
    `stored`, whether 16 bits have to hold the tensor; and of each recording, ending in `_a` and `_b`, `dtype`, `amax`,
    `rms` (in the tensors' own numbers, over their finite elements) and `lost` (elements that are NaN or infinite, masks
    left out).

    `amax_ulp` is the distance of the two `amax` in units in the last place of the narrower of the two dtypes, at the
    wider one's magnitude, that of its smallest normal number below that: 0 and more. It is inf where one of the two has
    lost elements and the other has not, NaN where both have, where a site is in one alone, and without a finite
    element. `amax_db` and `rms_db` are 20 · log10(a / b) in dB, NaN where a number is missing or both are 0.

    `sqnr` (dB) and `largest_ulp` are of all elements, not of these sums: the deviation of the narrower run from its
    reference, measured while they ran, as `profile` does where several dtypes run; NaN where that was not done.

    With `positions` there is a row for each batch row and position of each tensor of which both have
    `position_amax`, with `row`, `position` (absolute) and its `amax` alone.

    Raises MisuseError for `positions` where `record(..., position_peaks=True)` made neither of them, or not both.

    >>> import stabilitykit as sk
    >>> tiny = "random:gemma3-270m?layers=1&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512"
    >>> found = sk.profile(tiny, "Hi", dtypes=["float16", "float32"])
    >>> apart = compare(found["float16"], found["float32"])
    >>> bool(apart.loc[apart.site == "layers.0", "amax_ulp"].item() < 8)
    True
    """
    pairs = _joined(a, b)
    if positions:
        rows = [row for key, (one, other) in pairs for row in _by_position(key, one, other, a)]
        if not rows:
            raise MisuseError(
                "Neither recording keeps peaks by position, or only one does: record(position_peaks=True)."
            )
    else:
        rows = [_row(key, one, other, a, b) for key, (one, other) in pairs]
    names = list(rows[0]) if rows else list(_row((0, "", 0), None, None, a, b))
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=_dtype(name)) for name in names})


def _dtype(name: str) -> str:
    return _TYPES.get(name, "string" if name in _TEXTS else "bool" if name == "stored" else "float64")


def _joined(a: Recording, b: Recording) -> list[tuple[_Key, _Pair]]:
    """What is in `b` alone stands after what it follows there."""
    ours, theirs = dict(_numbered(a)), dict(_numbered(b))
    place = {key: float(at) for at, key in enumerate(ours)}
    last = -1.0
    for key in theirs:
        last = place.setdefault(key, math.nextafter(last, math.inf))
    keys = sorted(place, key=lambda key: (key[0], place[key]))
    return [(key, (ours.get(key), theirs.get(key))) for key in keys]


def _numbered(recording: Recording) -> Iterator[tuple[_Key, Record]]:
    seen: Counter[tuple[int, str]] = Counter()
    for record in recording:
        yield (record.step, record.site, seen[record.step, record.site]), record
        seen[record.step, record.site] += 1


def _row(key: _Key, one: Record | None, other: Record | None, a: Recording, b: Recording) -> dict[str, object]:
    known = one or other
    measured = next((r.deviation for r in _narrower_first(one, other) if r.deviation is not None), None)
    stored = any(r is not None and r.is_stored_in(of.header.dtype) for r, of in ((one, a), (other, b)))
    found: dict[str, object] = {
        "step": key[0],
        "site": key[1],
        "label": known and known.label,
        "layer": known and known.layer,
        "operator": known and known.operator,
        "found": "both" if one and other else "a" if one else "b",
        "stored": stored,
        "dtype_a": one and one.dtype,
        "dtype_b": other and other.dtype,
    }
    for name in ("amax", "rms"):
        ours, theirs = (None if r is None else getattr(r, name) for r in (one, other))
        found |= {f"{name}_a": ours, f"{name}_b": theirs}
        found |= {"amax_ulp": _apart(one, other)} if name == "amax" else {}
        found |= {f"{name}_db": _decibel(ours, theirs)}
    return found | {
        "lost_a": one and one.lost,
        "lost_b": other and other.lost,
        "sqnr": measured and measured.sqnr,
        "largest_ulp": measured and measured.largest_ulp,
    }


def _by_position(key: _Key, one: Record | None, other: Record | None, a: Recording) -> Iterator[dict[str, object]]:
    if one is None or other is None or one.position_amax is None or other.position_amax is None or not one.positions:
        return
    if len(one.position_amax) != len(other.position_amax):
        return
    start = a.header.first_position(key[0]) or 0
    for at, (ours, theirs) in enumerate(zip(one.position_amax, other.position_amax, strict=True)):
        row, position = divmod(at, one.positions)
        yield {
            "step": key[0],
            "site": key[1],
            "label": one.label,
            "layer": one.layer,
            "row": row,
            "position": start + position,
            "amax_a": ours,
            "amax_b": theirs,
            "amax_ulp": _ulps(ours, theirs, one, other),
            "amax_db": _decibel(ours, theirs),
        }


def _narrower_first(one: Record | None, other: Record | None) -> list[Record]:
    return sorted((r for r in (one, other) if r is not None), key=lambda r: _size(FORMATS.get(r.dtype)))


def _size(form: NumberFormat | None) -> tuple[int, int]:
    return (99, 0) if form is None else (form.precision, form.emax)


def _apart(one: Record | None, other: Record | None) -> float | None:
    if one is None or other is None or (one.lost and other.lost):
        return None
    if one.lost or other.lost:
        return math.inf
    return _ulps(one.amax, other.amax, one, other)


def _ulps(ours: float | None, theirs: float | None, one: Record, other: Record) -> float | None:
    narrow, wide = _narrower_first(one, other)
    form = FORMATS.get(narrow.dtype)
    if ours is None or theirs is None or form is None or not (math.isfinite(ours) and math.isfinite(theirs)):
        return None
    magnitude = max(theirs if wide is other else ours, form.smallest_normal)
    return abs(ours - theirs) / math.ldexp(1.0, math.frexp(magnitude)[1] - form.precision)


def _decibel(ours: float | None, theirs: float | None) -> float | None:
    if ours is None or theirs is None or (ours == 0 and theirs == 0):
        return None
    return math.inf if theirs == 0 else -math.inf if ours == 0 else 20 * math.log10(ours / theirs)
