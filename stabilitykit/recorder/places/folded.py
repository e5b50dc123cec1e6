"""Labels as kernels read them: each axis a dimension of its own, where the elements are in an order that allows it."""

from dataclasses import replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.places.labels import Label, Labels, label, labels


def axes_for(of: Labels) -> Axes:
    found = of.axes
    if found is None:
        found = of.axes = _axes(_placed(of))
    assert isinstance(found, Axes)
    return found


def _placed(of: Labels) -> Labels:
    """What belongs to no position but depends on the first of this step, and on none after it, is that one's."""
    newest = [slot for slot, last in of.bounds if last == 0]
    if of.position is not None or len(newest) != 1 or any(last > 0 for _, last in of.bounds):
        return of
    position = label(np.zeros((1,) * len(of.shape), np.int32))
    return labels(of.shape, of.row, position, slot=newest[0], bounds=dict(of.bounds), checks=of.checks)


def _axes(of: Labels) -> Axes:
    if of.row is None and of.position is None:
        return Axes(of.shape, labels=of)
    found = _folded(of)
    if found is None:
        return Axes(of.shape, slot=max(of.slot, 0), scattered=True, labels=of)
    return replace(found, slot=max(of.slot, 0), labels=of)


def _folded(of: Labels) -> Axes | None:
    """None where rows or positions do not count up along a dimension."""
    row, position = of.row, of.position
    parts = {d: [(size, "")] for d, size in enumerate(of.shape)}
    only_row = start = None
    along: tuple[int, ...] = ()
    if position is not None:
        along = position.dims
        if not along:
            start = position.low
        elif along != tuple(range(along[0], along[-1] + 1)):
            return None
        elif row is not None and row.dims == along:
            return _together(of, row, position)
        elif row is not None and set(row.dims) & set(along):
            return None
        else:
            counted = _counting(position.values.reshape(-1))
            if counted is None or (len(along) > 1 and counted[0] * counted[2] != 1):
                return None
            outer, count, inner, start = counted
            for d in along:
                parts[d] = []
            parts[along[0]] = [(outer, ""), (count, "position"), (inner, "")]
    if row is not None:
        if not row.dims:
            only_row = row.low
        elif len(row.dims) > 1:
            return None
        else:
            counted = _counting(row.values.reshape(-1))
            if counted is None or counted[0] != 1 or counted[3] != 0:
                return None
            parts[row.dims[0]] = [(counted[1], "row"), (counted[2], "")]
    sizes: list[int] = []
    names: list[str] = []
    for d in range(len(of.shape)):
        kept = [(size, name) for size, name in parts[d] if name or size > 1 or len(parts[d]) == 1]
        sizes += [size for size, _ in kept]
        names += [name for _, name in kept]
    return _finished(of, sizes, names, along, start, only_row)


def _together(of: Labels, row: Label, position: Label) -> Axes | None:
    """Of rows and positions that share a dimension, as `[B·L, D]` has them."""
    rows, positions = _counting(row.values.reshape(-1)), _counting(position.values.reshape(-1))
    if rows is None or positions is None or len(row.dims) > 1 or rows[0] != 1 or rows[3] != 0:
        return None
    if positions[0] != rows[1]:
        return None
    at = row.dims[0]
    middle = [(rows[1], "row"), (positions[1], "position")] + ([(positions[2], "")] if positions[2] > 1 else [])
    sizes = [*of.shape[:at], *(size for size, _ in middle), *of.shape[at + 1 :]]
    names = [*[""] * at, *(name for _, name in middle), *[""] * (len(of.shape) - at - 1)]
    return _finished(of, sizes, names, (at,), positions[3], None)


def _finished(
    of: Labels, sizes: list[int], names: list[str], along: tuple[int, ...], start: int | None, only_row: int | None
) -> Axes | None:
    """`start` is where positions begin; without a dimension of their own (`along`) they get one of size 1."""
    if of.position is not None and not along:
        free = [d for d, (size, name) in enumerate(zip(sizes[:-1], names, strict=False)) if size == 1 and not name]
        if free:
            names[free[-1]] = "position"
        else:
            at = max(0, len(sizes) - 1)
            sizes.insert(at, 1)
            names.insert(at, "position")
    if not names or names[-1]:
        sizes.append(1)
        names.append("")
    row = names.index("row") if "row" in names else None
    at_position = names.index("position") if "position" in names else None
    heads = [d for d, (size, name) in enumerate(zip(sizes[:-1], names, strict=False)) if size > 1 and not name]
    found = Axes(
        tuple(sizes),
        row=row,
        position=at_position,
        head=heads[0] if len(heads) == 1 else None,
        start=start or 0,
        only_row=only_row,
    )
    return _with_keys(of, found)


def _with_keys(of: Labels, found: Axes) -> Axes | None:
    if of.key is None or not of.has_later():
        return found
    counted = _counting(of.key.values.reshape(-1))
    last = len(of.shape) - 1
    if counted is None or of.key.dims != (last,) or counted[0] * counted[2] != 1 or found.position is None:
        return None
    _, keys, _, first_key = counted
    if found.start - first_key + found.shape[found.position] != keys or prod(found.shape) != prod(of.shape):
        return None
    return replace(found, pairs=True, first_key=first_key)


def _counting(values: NDArray[np.int32]) -> tuple[int, int, int, int] | None:
    """`(outer, count, inner, start)` of numbers that count up from `start`: each `inner` times, all `outer` times."""
    n = len(values)
    first = int(values[0])
    other = np.flatnonzero(values != first)
    inner = int(other[0]) if len(other) else n
    if n % inner:
        return None
    once = values[::inner]
    jumps = np.flatnonzero(np.diff(once) != 1)
    count = int(jumps[0]) + 1 if len(jumps) else len(once)
    if len(once) % count:
        return None
    outer = len(once) // count
    expected = np.tile(np.repeat(np.arange(first, first + count), inner), outer)
    return (outer, count, inner, first) if np.array_equal(values, expected) else None
