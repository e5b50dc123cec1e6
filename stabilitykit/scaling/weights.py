"""How large a model's weights are, block by block: what a program needs to know of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.checkpoints.mapped import read_once
from stabilitykit.recorder.statistics import measure
from stabilitykit.scaling.trace import Graph, Parameter

FIRST = -160  # the exponent that `Magnitudes.exponents` begins with: below float32's smallest subnormal
_BINS = 320


@dataclass(frozen=True, slots=True, eq=False)
class Magnitudes:
    """The largest finite magnitude of a block, and how many elements there are of each exponent from `FIRST` on."""

    largest: float
    exponents: NDArray[np.int64]


def magnitudes(
    graph: Graph, tensor: Callable[[str], Tensor], announce: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, list[Magnitudes]]:
    """Of each parameter, its blocks'; of a gain c + w, those of the sum. `tensor` gives a parameter by its name."""
    found = {}
    for number, (name, parameter) in enumerate(graph.parameters.items()):
        announce(number, len(graph.parameters))
        whole = tensor(name)
        if parameter.added is not None:
            whole = whole.float() + parameter.added
        found[name] = [_of(parts) for parts in _blocks(whole, parameter)]
    return found


def _blocks(tensor: Tensor, parameter: Parameter) -> list[list[Tensor]]:
    """The parts of each block: runs of equal numbers along the dimension that is cut."""
    if not parameter.blocks:
        return [[tensor]]
    parts: list[list[Tensor]] = [[] for _ in parameter.expressions]
    numbered, sizes = torch.unique_consecutive(torch.tensor(parameter.blocks), return_counts=True)
    for number, part in zip(numbered.tolist(), torch.split(tensor, sizes.tolist(), parameter.dim), strict=True):
        parts[number].append(part)
    return parts


def _of(parts: Iterable[Tensor]) -> Magnitudes:
    exponents, largest = np.zeros(_BINS, np.int64), 0.0
    for part in parts:
        for piece in read_once(part) if part.is_contiguous() else [part]:
            found = measure(piece, ())
            largest = max(largest, found.amax or 0.0)
            begin = found.exponent_first - FIRST
            exponents[begin : begin + len(found.exponents)] += np.asarray(found.exponents, np.int64)
    return Magnitudes(largest, exponents)
