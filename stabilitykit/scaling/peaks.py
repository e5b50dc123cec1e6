"""The largest magnitudes of a float32 run, by the exponent that each has in a trace."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.scaling.call import numbers
from stabilitykit.scaling.exponents import Expression
from stabilitykit.scaling.following import Following
from stabilitykit.scaling.rules import MOVES
from stabilitykit.scaling.shadows import values
from stabilitykit.scaling.trace import Graph, Run, peaks_of, result_site

Peaks = dict[Expression, tuple[float, str]]
"""By exponent, the largest finite magnitude that a 16-bit run would store, and the operator that makes it."""


def measure(graph: Graph, model: nn.Module, runs: Iterable[Run]) -> Peaks:
    """What `runs` of the float32 `model` come to, at the operators that `graph` has.

    Operators are matched by module and number. Those that no float32 run has keep what the trace saw in bfloat16.
    """
    found: dict[str, dict[Expression, float]] = {}
    for run in runs:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            mode = _Measuring(graph, model, found)
            mode.attach(stack)
            with mode:
                run(model)
    peaks: Peaks = {}
    for site, stored in graph.stored.items():
        for one, largest in found.get(site, stored.peaks).items():
            if largest > peaks.get(one, (0.0, ""))[0]:
                peaks[one] = largest, site
    return peaks


class _Measuring(Following):  # type: ignore[no-untyped-call]
    def __init__(self, graph: Graph, model: nn.Module, found: dict[str, dict[Expression, float]]) -> None:
        super().__init__(model)
        self.graph = graph
        self.found = found

    def after(self, name: str, site: str, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        if name not in MOVES:
            for place, tensor in enumerate(numbers(output)):
                own = result_site(site, place)
                if own in self.graph.stored:
                    self._look(own, tensor)

    def _look(self, site: str, tensor: Tensor) -> None:
        shadow = self.graph.stored[site].shadow
        largest = self.found.setdefault(site, {})
        if not isinstance(shadow, int) and not _fits(shadow, tensor):
            ((_, most),) = peaks_of(tensor, 0)
            for one in values(shadow):
                largest[one] = max(most, largest.get(one, 0.0))
            return
        for one, most in peaks_of(tensor, shadow):
            largest[one] = max(most, largest.get(one, 0.0))


def _fits(shadow: Tensor, tensor: Tensor) -> bool:
    """Of another length of prompt the same; of an operator that does something else, not."""
    return shadow.ndim == tensor.ndim and all(
        own in (1, size) for own, size in zip(shadow.shape, tensor.shape, strict=True)
    )
