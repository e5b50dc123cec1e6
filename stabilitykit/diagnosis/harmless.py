"""Whether what became of an infinity is what would have become of the true value.

A bound on the true value is carried from the break to where it ends: what overflowed is at least the format's maximum,
and a scale or a logarithm on the way changes that by an amount which the finite elements show.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from stabilitykit.formats import FLOAT32, FORMATS, NumberFormat
from stabilitykit.records import Record
from stabilitykit.words import number

_CLAMPS = ("clamp", "clamp_max", "clamp_min", "hardtanh", "relu6", "minimum", "maximum")
_REPLACES = ("where", "masked_fill", "index_fill", "index_put", "nan_to_num")
_UNCHANGED = ("cast", "neg", "abs", "clone", "cat", "index", "index_select", "gather")


@dataclass(frozen=True, slots=True)
class Ending:
    """Where damage ended: `how`, and whether that is what the true value would have come to, None where not known."""

    record: Record
    how: str
    harmless: bool | None


def ending(trail: Sequence[Record], absorbs: Record) -> Ending:
    """`trail` holds what was lost, in order, from the break to what `absorbs` read."""
    last = trail[-1]
    signs = (last.positive_inf > 0, last.negative_inf > 0)
    how = _how(absorbs, *signs)
    if last.nan or not any(signs):
        return Ending(absorbs, how, False if absorbs.operator == "nan_to_num" else None)
    return Ending(absorbs, how, _is_same(absorbs, last, _carried(trail), trail[0]))


def _how(record: Record, positive: bool, negative: bool) -> str:
    operator = record.operator or ""
    infinity = "an infinity" if positive and negative else "infinity" if positive else "minus infinity"
    ends = {"tanh": ("1", "-1"), "erf": ("1", "-1"), "sigmoid": ("1", "0"), "hardsigmoid": ("1", "0")}
    if operator in ends:
        of = "" if operator in ("tanh", "erf") else "the "
        value = " or ".join(end for end, seen in zip(ends[operator], (positive, negative), strict=True) if seen)
        return f"{of}{operator} of {infinity} is {value}"
    if operator in _CLAMPS:
        bound = record.maximum if positive else record.minimum
        return f"{infinity} is clamped to {number(bound)}"
    if operator == "cast" and record.dtype.startswith("float8"):
        return f"the cast to {record.dtype} makes {number(record.amax)} of {infinity}"
    known = {
        "div": "a number divided by infinity is 0",
        "reciprocal": "1 / infinity is 0",
        "rsqrt": "1 / √infinity is 0",
        "pow": "a negative power of infinity is 0",
        "exp": "exp of minus infinity is 0",
        "softmax": "the softmax of minus infinity is 0",
        "relu": "relu of minus infinity is 0",
        "max": "the largest of several numbers is not minus infinity",
        "amax": "the largest of several numbers is not minus infinity",
        "nan_to_num": "nan_to_num puts numbers in the place of NaN and infinities",
        "where": "another number is put in its place",
        "masked_fill": "another number is put in its place",
    }
    return known.get(operator, f"{operator or 'the module'} returns finite numbers again")


def _carried(trail: Sequence[Record]) -> float | None:
    """A lower bound on the magnitude of the true value where the last of the trail is infinite; None for no bound."""
    first, broke = trail[0], trail[0].broke
    if broke is None:
        return None
    bound: float | None = broke.limit
    if broke.kind == "division-by-zero":
        bound = None if broke.rounded_site is not None else math.inf
    elif broke.kind == "reduction":
        bound = abs(broke.value) if broke.value is not None and broke.count == 1 else None
    elif broke.kind != "overflow":
        return None
    for before, record in pairwise(trail):
        if bound is None or record.lost != before.lost:
            return None
        scale = abs(broke.scaled / broke.value) if before is first and broke.scaled and broke.value else None
        if record.operator in ("mul", "div"):
            scale = scale if scale is not None and math.isfinite(scale) else _scale(before, record)
            bound = None if scale is None else bound * scale
        elif record.operator in ("add", "sub"):
            bound = 0.9 * bound if _is_hardly_moved(before, record, bound) else None
        elif record.operator in ("log", "log1p"):
            bound = math.log(bound) if bound > 1 else None
        elif record.operator == "sqrt":
            bound = math.sqrt(bound)
        elif record.operator not in _UNCHANGED:
            return None
    return bound


def _scale(before: Record, after: Record) -> float | None:
    """The number that all finite elements were multiplied by; None where they were not by one number."""
    if not before.amax or not after.amax or not before.rms or not after.rms:
        return None
    largest, mean = after.amax / before.amax, after.rms / before.rms
    return min(largest, mean) if math.isclose(largest, mean, rel_tol=0.01) else None


def _is_hardly_moved(before: Record, after: Record, bound: float) -> bool:
    ends = ((before.maximum, after.maximum), (before.minimum, after.minimum), (before.mean, after.mean))
    return all(old is None or new is None or abs(new - old) <= bound / 100 for old, new in ends)


def _is_same(record: Record, last: Record, bound: float | None, first: Record) -> bool | None:
    """Whether the operator makes of every magnitude from `bound` up what it made of an infinity."""
    operator = record.operator or ""
    if operator in ("div", "reciprocal", "rsqrt", "pow", "nan_to_num"):
        return False
    if operator == "cast":
        return False if record.dtype.startswith("float8") else None
    if operator in _REPLACES:
        return _replaced(record, last)
    if bound is None:
        return None
    if operator in _CLAMPS:
        return _is_clamped_alike(record, last, bound, first)
    positive, negative = last.positive_inf > 0, last.negative_inf > 0
    form = FORMATS.get(record.dtype, FLOAT32)
    near_one, near_zero = (form.precision + 1) * math.log(2), (form.precision - form.emin) * math.log(2)
    if operator == "softmax":
        return None if last.minimum is None or last.minimum + bound < near_zero else True
    if operator in ("max", "amax"):
        return True if record.minimum is not None and record.minimum > -bound else None
    needed = {
        "tanh": near_one / 2 + 1,
        "erf": math.sqrt(near_one),
        "sigmoid": near_zero if negative else near_one,
        "hardsigmoid": 3.0,
        "exp": near_zero,
        "expm1": near_one,
        "elu": near_one,
        "selu": near_one,
        "softplus": near_zero,
        "relu": 0.0,
    }
    if operator not in needed or (positive and operator not in ("tanh", "erf", "sigmoid", "hardsigmoid")):
        return None
    return True if bound >= needed[operator] else None


def _is_clamped_alike(record: Record, last: Record, bound: float, first: Record) -> bool | None:
    """A bound near the format's own maximum is there because of the format; one far below applies in every format."""
    assert first.broke is not None
    ends = [record.maximum] if last.positive_inf else []
    ends += [record.minimum] if last.negative_inf else []
    if any(end is None for end in ends):
        return None
    sizes = [abs(end) for end in ends if end is not None]
    if max(sizes) >= 0.9 * first.broke.limit:
        return False
    return True if max(sizes) <= min(0.5 * first.broke.limit, bound) else None


def _replaced(record: Record, last: Record) -> bool | None:
    """Whether zeros or the largest number were put exactly where something was lost; a mask takes whole positions."""
    form: NumberFormat = FORMATS.get(record.dtype, FLOAT32)
    scattered = last.lost < last.lost_positions * (last.channels or 0)
    if record.elements == last.elements and scattered and record.zero - last.zero == last.lost:
        return False
    return False if record.amax is not None and record.amax >= 0.95 * form.largest else None
