"""The largest magnitude at each position: what the machine code needs to know, and the same in torch's operators."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.recorder.kernels.axes import Axes

_BLOCK = 512  # positions


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """`numbers`, at `address`: elements after a position, elements after a row, positions, keys before the first query,
    whether elements join a query and a key, and how many peaks there are. Those have `shape`: [positions] or
    [rows, positions].
    """

    numbers: NDArray[np.int64]
    address: int
    shape: tuple[int, ...]


@lru_cache(maxsize=4096)
def positions(axes: Axes) -> Positions:
    """Of a tensor whose `axes` have a position."""
    assert axes.position is not None
    row = -1 if axes.row is None else axes.row
    after_position, after_row = (prod(axes.shape[dim + 1 :]) for dim in (axes.position, row))
    length, before = axes.shape[axes.position], axes.start - axes.first_key
    shape = (length,) if axes.row is None else (axes.shape[axes.row], length)
    numbers = np.array([after_position, after_row, length, before, axes.pairs, prod(shape)], dtype=np.int64)
    return Positions(numbers, int(numbers.ctypes.data), shape)


def position_peaks(values: Tensor, axes: Axes, masked: Tensor | None) -> Tensor:
    """The largest finite magnitude that is not masked, by row and position; 0 where there is none."""
    magnitudes = axes.fold(values).abs().nan_to_num(nan=0.0, posinf=0.0)
    if masked is not None:
        magnitudes = magnitudes.masked_fill(masked.reshape(magnitudes.shape), 0)
    kept = {d for d in (axes.row, axes.position) if d is not None}
    if axes.pairs:
        magnitudes = _later_of_both(magnitudes, axes.start - axes.first_key)
    for dim in reversed([d for d in range(magnitudes.ndim) if d not in kept]):
        magnitudes = magnitudes.amax(dim)
    return magnitudes


def _later_of_both(scores: Tensor, before: int) -> Tensor:
    """[..., L, `before` + L] -> [..., L]: what element k gathers is row k up to the diagonal, and column k down to it.

    The first `before` keys are those of earlier positions. By blocks, so that all but the diagonal ones are read in
    place.
    """
    parts = []
    for start in range(0, scores.shape[-2], _BLOCK):
        here, there = slice(start, start + _BLOCK), slice(before + start, before + start + _BLOCK)
        corner = scores[..., here, there]
        gathered = [corner.tril().amax(-1), corner.triu().amax(-2)]
        if before + start:
            gathered.append(scores[..., here, : before + start].amax(-1))
        if start:
            gathered.append(scores[..., :start, there].amax(-2))
        parts.append(torch.stack(gathered).amax(0))
    return torch.cat(parts, dim=-1)
