"""What the launches of Triton's kernels share: which devices they run on, how many programs fill one, strides.

This can be imported without Triton; `cuda` and `cuda_softmax` cannot.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from stabilitykit.recorder.kernels.places import OUTER, joined

_LEAST_CAPABILITY = (8, 0)  # what Triton supports
_PROGRAMS = 3  # for each multiprocessor, as many as its registers have room for
_INTERPRETED = 3  # programs on a CPU, where Triton's interpreter runs one after the other
_LARGE = 1 << 30  # from this offset on, 32 bits may not hold it and what the last round of a loop adds


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether kernels can be compiled for it: a GPU of Nvidia's, Ampere or later, with Triton installed."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )


@cache
def programs(device: torch.device) -> int:
    """How many programs keep the whole device busy."""
    if device.type != "cuda":
        return _INTERPRETED
    return _PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on torch's current device; this makes it the tensors' own."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`, and at least 1."""
    return 1 << max(least - 1, 0).bit_length()


def walked(tensors: Sequence[Tensor], *, keep: int = 0) -> tuple[list[Tensor], tuple[int, ...], int]:
    """The tensors, sizes and strides as in `places.joined`, and how many of the dimensions are needed.

    Tensors of more dimensions than can be joined are copied.
    """
    found = joined(tensors[0].shape, tuple(tensor.stride() for tensor in tensors), keep=keep)
    if found is None:
        tensors = [tensor.contiguous() for tensor in tensors]
        found = joined(tensors[0].shape, tuple(tensor.stride() for tensor in tensors), keep=keep)
        assert found is not None
    places = tuple(found.numbers.tolist())
    needed = next((OUTER + 1 - i for i, size in enumerate(places[: OUTER + 1]) if size != 1), 1)
    return list(tensors), places, needed


def large(tensors: Sequence[Tensor]) -> bool:
    """Whether indices or offsets into one of these need 64 bits."""
    return any(
        tensor.numel() >= _LARGE
        or sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) >= _LARGE
        for tensor in tensors
    )
