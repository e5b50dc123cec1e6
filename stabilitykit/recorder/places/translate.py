"""Labels of an earlier step in terms of the present one: what a cache holds, and what else outlives its step."""

from typing import Any

import numpy as np

from stabilitykit.recorder.places.labels import NONE, Label, Labels, constant, label, labels
from stabilitykit.recorder.places.streams import Step, Stream


def translated(old: Labels, then: Step, now: Step) -> Labels:
    """Labels of the step `then` in terms of the step `now`."""
    row, position, key = old.row, old.position, old.key
    slot, key_slot = old.slot, old.key_slot
    if position is not None:
        slot, shift = _slot(then, now, slot)
        position = _moved(position, shift)
        if row is not None:
            row = _continued(row, then.streams[old.slot], now.streams[slot])
    if key is not None:
        key_slot, shift = _slot(then, now, key_slot)
        key = _moved(key, shift)
    bounds: dict[int, int] = {}
    for number, last in old.bounds:
        new, shift = _slot(then, now, number)
        bounds[new] = max(bounds.get(new, last + shift), last + shift)
    checks = 0
    for number, check in enumerate(then.checks if old.checks else ()):
        if old.checks >> number & 1:
            place = next((i for i, other in enumerate(now.checks) if other is check), None)
            if place is None:
                place = len(now.checks)
                now.checks.append(check)
            checks |= 1 << place
    return labels(
        old.shape, row, position, key, slot=slot, key_slot=key_slot, bounds=bounds, checks=checks, hidden=old.hidden
    )


def _slot(then: Step, now: Step, slot: int) -> tuple[int, int]:
    """Where a stream of another step is in this one, and how far its positions move."""
    stream = then.streams[slot]
    for number, other in enumerate(now.streams):
        if other.sequence is stream.sequence:
            return number, stream.start - other.start
    now.streams.append(stream)
    return len(now.streams) - 1, 0


def _moved(part: Label, shift: int) -> Label | None:
    if not shift:
        return part
    values = part.values + np.int32(shift) if part.complete else _shifted(part.values, shift)
    if part.high + shift >= 0:
        values = np.where(values >= 0, NONE, values)  # was cut off: this step's own stand there
    return label(values)


def _continued(row: Label, stream: Stream, other: Stream) -> Label | None:
    """Rows of a stream that `other` goes on with in another order, in that order."""
    one: Stream | None = other
    while one is not None and one is not stream and one.row_from is None:
        one = one.after
    if one is None or one is stream:
        return row
    if one is not other or one.after is not stream:
        return None  # turned round more than once
    assert other.row_from is not None
    source = np.asarray(other.row_from, np.int32)
    now = np.flatnonzero(np.isin(source, row.values))
    if row.values.size == source.size and np.array_equal(row.values.reshape(-1), source):
        return label(np.arange(source.size).reshape(row.values.shape))
    return constant(int(now[0]), row.values.ndim) if not row.dims and len(now) == 1 else None


def _shifted(values: Any, shift: int) -> Any:
    return np.where(values == NONE, NONE, values + np.int32(shift))
