"""Peaks alone: the largest magnitude at each position and whether anything was lost, at the speed of memory.

A long prompt's attention scores have hundreds of millions of elements. Two reductions over them say what every
shorter prompt needs to know; the full statistics take twenty times as long.
"""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from stabilitykit.recorder.axes import Axes
from stabilitykit.recorder.kernels.layout import FIELDS, Field
from stabilitykit.recorder.statistics import Row
from stabilitykit.records import flat_index, index_at

_BLOCK = 512  # positions


def measure_peaks(values: Tensor, axes: Axes, masked: Tensor | None) -> tuple[Row, Tensor] | None:
    """The row of `values` without histogram and sums, and the amax by row and position, in at least float32.

    `axes` tells its axes apart; `masked`, boolean and of as many, marks elements that
    enter nothing. None where there is no position
    axis, no element, or an element that is not finite: such a tensor deserves the full statistics.
    """
    if axes.position is None or values.numel() == 0:
        return None
    tensor = axes.fold(values)
    hidden = 0
    if masked is not None:
        hidden = int(masked.sum())
        tensor = tensor.masked_fill(masked.reshape(tensor.shape), 0)
    high, low = (_by_position(tensor, axes, reduce) for reduce in (torch.amax, torch.amin))
    wide = torch.promote_types(tensor.dtype, torch.float32)
    peaks = torch.maximum(high.to(wide), -low.to(wide)).abs()  # no −0
    if not bool(peaks.isfinite().all()):
        return None
    peak = int(peaks.argmax())
    amax = float(peaks.flatten()[peak])
    tied = int((peaks == amax).sum()) > 1
    place = index_at(peak, peaks.shape)
    index = _first_of_all(amax, tensor, axes) if tied else _index_of(amax, place, tensor, axes)
    row = np.zeros(FIELDS)
    row[Field.MASKED], row[Field.SCALE] = hidden, 1.0
    row[Field.AMAX] = amax if hidden < tensor.numel() else -1.0
    row[Field.INDEX] = flat_index(index, tensor.shape)
    return row, peaks


def position_peaks(values: Tensor, axes: Axes, masked: Tensor | None) -> Tensor:
    """The largest finite magnitude that is not masked, by row and position; 0 where there is none."""
    magnitudes = axes.fold(values).abs().nan_to_num(nan=0.0, posinf=0.0)
    if masked is not None:
        magnitudes = magnitudes.masked_fill(masked.reshape(magnitudes.shape), 0)
    return _by_position(magnitudes, axes, torch.amax)


def _by_position(tensor: Tensor, axes: Axes, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`tensor` reduced to its rows and positions; with 0 thrown in where elements join two positions."""
    kept = {d for d in (axes.row, axes.position) if d is not None}
    if axes.pairs:
        tensor = _later_of_both(tensor, reduce, axes.start - axes.first_key)
    for dim in reversed([d for d in range(tensor.ndim) if d not in kept]):
        tensor = reduce(tensor, dim)
    return tensor


def _later_of_both(scores: Tensor, reduce: Callable[[Tensor, int], Tensor], before: int) -> Tensor:
    """[..., L, `before` + L] -> [..., L]: what element k gathers is row k up to the diagonal, and column k down to it.

    The first `before` keys are those of earlier positions. By blocks, so that all but the diagonal ones are read in
    place.
    """
    parts = []
    for start in range(0, scores.shape[-2], _BLOCK):
        here, there = slice(start, start + _BLOCK), slice(before + start, before + start + _BLOCK)
        corner = scores[..., here, there]
        gathered = [reduce(corner.tril(), -1), reduce(corner.triu(), -2)]
        if before + start:
            gathered.append(reduce(scores[..., here, : before + start], -1))
        if start:
            gathered.append(reduce(scores[..., :start, there], -2))
        parts.append(reduce(torch.stack(gathered), 0))
    return torch.cat(parts, dim=-1)


def _index_of(amax: float, place: tuple[int, ...], tensor: Tensor, axes: Axes) -> tuple[int, ...]:
    """The first element of this magnitude that belongs to the row and position `place`."""
    position = place[-1]
    within: list[slice] = [slice(None)] * tensor.ndim
    if axes.row is not None:
        within[axes.row] = slice(place[0], place[0] + 1)
    assert axes.position is not None
    if not axes.pairs:
        within[axes.position] = slice(position, position + 1)
        found = _first(amax, tensor, within)
        assert found is not None
        return found
    # What belongs to a position of scores is its column down to the diagonal, and its row up to it.
    one, up_to = slice(position, position + 1), slice(0, position + 1)
    column = axes.start - axes.first_key + position
    key, keys = slice(column, column + 1), slice(0, column + 1)
    places = [_first(amax, tensor, [*within[:-2], *ends]) for ends in ((up_to, key), (one, keys))]
    return min(found for found in places if found is not None)


def _first_of_all(amax: float, tensor: Tensor, axes: Axes) -> tuple[int, ...]:
    """The first element of this magnitude in row-major order, sought block by block: where peaks tie, one is early."""
    assert axes.position is not None
    rest = [slice(None)] * (tensor.ndim - axes.position - 1)
    for lead in product(*map(range, tensor.shape[: axes.position])):
        for start in range(0, tensor.shape[axes.position], _BLOCK):
            block = [*(slice(i, i + 1) for i in lead), slice(start, start + _BLOCK), *rest]
            found = _first(amax, tensor, block)
            if found is not None:
                return found
    raise AssertionError("a tensor holds its own largest magnitude")


def _first(amax: float, tensor: Tensor, within: Sequence[slice]) -> tuple[int, ...] | None:
    """Where in the part `within` the first element of this magnitude stands; None where there is none."""
    part = tensor[tuple(within)]
    matches = (part.abs() == amax).flatten()
    at = int(matches.int().argmax())
    if not bool(matches[at]):
        return None
    inside = index_at(at, part.shape)
    return tuple(start + (cut.start or 0) for start, cut in zip(inside, within, strict=True))
