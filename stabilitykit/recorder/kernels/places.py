"""Where in memory the elements of tensors of one shape are, as few numbers as a kernel can walk through them by."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

OUTER = 4  # dimensions before the last that a kernel walks through


@dataclass(frozen=True, slots=True)
class Places:
    """`OUTER` + 1 sizes, then as many strides of each tensor, in elements; and the address of these numbers."""

    numbers: NDArray[np.int64]
    address: int


@lru_cache(maxsize=4096)
def joined(shape: Sequence[int], strides: Sequence[Sequence[int]], *, keep: int = 0) -> Places | None:
    """Sizes of the dimensions that the tensors of one shape have in common, then the strides of each of them.

    Dimensions are joined that lie in memory in one piece in all of them, the last `keep` excepted, and filled up on the
    left to `OUTER` + 1. None for more than that.
    """
    found: list[list[int]] = []
    kept = len(shape) - keep
    for dim, parts in enumerate(zip(shape, *strides, strict=True)):
        size, *steps = parts
        if dim >= kept:
            found.append([size, *steps])
        elif size != 1:
            if found and all(a == b * size for a, b in zip(found[-1][1:], steps, strict=True)):
                found[-1] = [found[-1][0] * size, *steps]
            else:
                found.append([size, *steps])
    if len(found) > OUTER + 1:
        return None
    filled = [[1] + [0] * len(strides)] * (OUTER + 1 - len(found)) + found
    numbers = np.array(filled, dtype=np.int64).T.reshape(-1)
    return Places(numbers, int(numbers.ctypes.data))
