"""Reading memory-mapped tensors without keeping them in memory.

A page of a mapped file is resident from the first time it is read, and counts as the process's memory. Reading a few
rows at a time, and giving their pages back, limits that to a few rows. The pages can be read from the file again at
any time, and the system may keep them in its page cache.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 22
"""Elements that are read at a time: 8 MiB of 16-bit weights."""

_PAGEMAP = Path("/proc/self/pagemap")  # eight bytes a page; see the kernel's admin-guide/mm/pagemap.rst
_IN_USE = np.uint64(0b11 << 62)  # present in memory, or swapped out
_OF_A_FILE = np.uint64(1 << 61)


def pieces(tensor: Tensor, elements: int = PIECE) -> tuple[Tensor, ...]:
    """Views of consecutive rows that together are the tensor, each of one row or of at most `elements` elements."""
    if tensor.ndim == 0 or tensor.numel() <= elements:
        return (tensor,)
    return torch.split(tensor, max(1, elements * len(tensor) // tensor.numel()))


def read_once(tensor: Tensor) -> Iterator[Tensor]:
    """`pieces`, each of whose pages are given back when the next one is requested."""
    for piece in pieces(tensor):
        yield piece
        give_back(piece)


def empty_like(tensor: Tensor, dtype: torch.dtype, *, sparse: bool = False) -> Tensor:
    """A contiguous CPU tensor of this shape in memory that returns to the system with it, not to an allocator.

    Allocators hold on to freed memory. Only pages that are written to become resident: with `sparse` that will be few,
    and otherwise huge pages save page faults.
    """
    memory = mmap.mmap(-1, max(1, tensor.numel() * dtype.itemsize))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # kernels may be built without
            memory.madvise(mmap.MADV_NOHUGEPAGE if sparse else mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=tensor.numel()).view(tensor.shape)


def equal(one: Tensor, other: Tensor) -> bool:
    """`torch.equal` of two mapped tensors."""
    if one.shape != other.shape:
        return False
    pairs = zip(read_once(one), read_once(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def give_back(tensor: Tensor) -> None:
    """Lets the system reclaim the pages within a contiguous CPU tensor, if all of them are unchanged pages of a file.

    No value changes: where a page was written to, or is not of a mapped file, nothing happens. Nor does it on systems
    other than Linux.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    count = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
    advise = _madvise()
    if advise is not None and count > 0 and _are_a_files(first, count):
        advise(first * mmap.PAGESIZE, count * mmap.PAGESIZE, mmap.MADV_DONTNEED)


def _are_a_files(first: int, count: int) -> bool:
    """Whether the pages from number `first` on that are in use are all unchanged pages of files."""
    try:
        with _PAGEMAP.open("rb", buffering=0) as file:
            file.seek(8 * first)
            entries = np.frombuffer(file.read(8 * count), np.uint64)
    except OSError:  # some containers have no such file
        return False
    used = entries[(entries & _IN_USE) != 0]
    return len(entries) == count and bool(((used & _OF_A_FILE) != 0).all())


@cache
def _madvise() -> Any:
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
