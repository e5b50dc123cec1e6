"""Convolutions: those that keep positions, and those from which a new sequence begins, of frames or patches."""

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from stabilitykit.recorder.places.labels import NONE, Array, Label, Labels, beyond, label, labels, widen
from stabilitykit.recorder.places.rules import Request

Begin = Callable[[str, tuple[int, ...], int], int]
"""Begins a sequence: what it counts, and its rows and length; returns its slot."""

GRIDS = frozenset(
    "convolution _convolution mkldnn_convolution cudnn_convolution conv1d conv2d conv3d avg_pool1d avg_pool2d "
    "avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa "
    "pixel_shuffle pixel_unshuffle slow_conv2d_forward thnn_conv2d conv_transpose1d conv_transpose2d".split()
)


def convolved(request: Request, begin: Begin) -> Sequence[Labels | None]:
    """`[N, C, ...]` to `[N, C', ...]`; the first result, the others belong nowhere."""
    own, shape = request.own, request.shape
    if len(shape) != len(own.shape) or len(shape) < 3 or 0 in shape:
        return [None for _ in request.shapes]
    given = request.given
    weight = given.get("weight")
    kernel = list(weight.shape[2:]) if weight is not None else _list(given.get("kernel_size"), len(shape) - 2)
    strides = _list(given.get("stride"), len(shape) - 2) or kernel
    padding = _list(given.get("padding", 0), len(shape) - 2)
    dilation = _list(given.get("dilation", 1), len(shape) - 2)
    plain = weight is not None and not given.get("transposed", False)
    row = None if own.row is None or any(d > 0 for d in own.row.dims) else own.row
    if row is None and (own.blank or own.raw):
        row = label(np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)))
    if own.position is not None and not own.raw and plain and all(s == 1 for s in strides):
        found = _followed(own, row, shape, kernel, padding, dilation)
        if found is not None:
            return [found, *(None for _ in request.shapes[1:])]
    grid = shape[2:]
    if prod(grid) == 1:
        bounds, checks = beyond([own], whole=True)
        return [labels(shape, row, bounds=bounds, checks=checks), *(None for _ in request.shapes[1:])]
    apart = plain and all(k == s for k, s in zip(kernel, strides, strict=True))
    counts = "frame" if len(grid) == 1 else "patch" if apart else "position"
    slot = begin(counts, shape, prod(grid))
    position = label(np.arange(prod(grid)).reshape(1, 1, *grid))
    bounds, checks = beyond([own], whole=True)
    if not apart:
        widen(bounds, {slot: prod(grid) - 1})
    return [
        labels(shape, row, position, slot=slot, bounds=bounds, checks=checks),
        *(None for _ in request.shapes[1:]),
    ]


def _list(value: object, count: int) -> list[int]:
    if isinstance(value, int):
        return [value] * count
    found = list(value) if isinstance(value, list | tuple) else []
    return found * count if len(found) == 1 else found


def _followed(
    own: Labels,
    row: Label | None,
    shape: tuple[int, ...],
    kernel: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Labels | None:
    """Of a convolution that steps from one position to the next; None where it loses them."""
    position = own.position
    assert position is not None
    if any(d < 2 for d in position.dims) or own.key is not None:
        return None
    bounds = dict(own.bounds)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    moved: Array = position.values
    if all(p * 2 == r for p, r in zip(padding, reach, strict=True)):
        if any(reach):
            widen(bounds, {own.slot: position.high})
    elif len(shape) == 3 and position.dims in ((), (2,)):
        moved = _latest(np.broadcast_to(moved, (*moved.shape[:2], own.shape[2])), shape[2], padding[0], reach[0])
    else:
        return None
    found = label(moved)
    return labels(shape, row, found, slot=own.slot, bounds=bounds, checks=own.checks)


def _latest(values: Array, length: int, padding: int, reach: int) -> NDArray[np.int32]:
    """The latest position that each window holds."""
    padded = np.pad(values, ((0, 0), (0, 0), (padding, padding)), constant_values=NONE)
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach + 1, axis=2)
    latest: NDArray[np.int32] = windows.max(axis=-1)[:, :, :length]
    return latest
