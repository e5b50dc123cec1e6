"""From a model and what it is run on to all that a choice of its scaling needs to know."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from stabilitykit.errors import MisuseError
from stabilitykit.models.stream import stored_weight
from stabilitykit.scaling.blueprint import Blueprint
from stabilitykit.scaling.peaks import Peaks, measure
from stabilitykit.scaling.program import Solution, solve
from stabilitykit.scaling.trace import Graph, Run, trace
from stabilitykit.scaling.weights import Magnitudes, magnitudes
from stabilitykit.words import counted, listed

Announce = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and out of how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """All that is known of a model before a scaling is chosen; one trace serves several choices."""

    graph: Graph
    peaks: Peaks
    weights: Mapping[str, Sequence[Magnitudes]]
    settings: Mapping[str, Any]

    def solve(self, **choice: Any) -> Solution:
        """As `program.solve`, which says what there is to choose."""
        return solve(self.graph, self.peaks, self.weights, settings=self.settings, **choice)


def look(
    model: nn.Module,
    low: nn.Module,
    runs: Sequence[Run],
    blueprint: Blueprint | None = None,
    *,
    announce: Announce = lambda stage, done, total: None,
) -> Traced:
    """Traces the first of `runs` on `low`, and measures all of them on `model`.

    Args:
        model: in float32, and never changed.
        low: the same in bfloat16.
        runs: each runs a model and returns what its caller gets. The first should take every path through the model
            there is: prefill, steps with a cache, every expert.
        blueprint: how the model is built from its config; without it every eps counts as fixed.
        announce: called as the work goes on.

    Raises MisuseError where a parameter is never used, so that nothing can be known of its scale.
    """
    announce("tracing", 0, 1)
    graph = trace(low, runs[0], blueprint)
    unused = graph.unused
    if unused:
        raise MisuseError(
            f"{counted(len(unused), 'parameter')} of {len(graph.parameters)} took no part in the traced run "
            f"({listed(unused, 3)}), so it is not known what scales with what. Run the model on something that uses "
            "all of it."
        )
    weights = magnitudes(graph, partial(stored_weight, model), lambda done, total: announce("weights", done, total))
    counting = _counted(runs, lambda done, total: announce("measuring", done, total))
    peaks = measure(graph, model, counting)
    settings = {} if blueprint is None else _flat(blueprint.settings)
    return Traced(graph=graph, peaks=peaks, weights=weights, settings=settings)


def _counted(runs: Sequence[Run], announce: Callable[[int, int], None]) -> Iterator[Run]:
    for number, run in enumerate(runs):
        announce(number, len(runs))
        yield run


def _flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in settings.items():
        made |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return made
