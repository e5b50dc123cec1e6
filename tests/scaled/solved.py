"""Entries traced and solved, and points drawn from what their equations leave free."""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from scaled.table import ENTRIES
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.scaling.look import Traced, look
from stabilitykit.scaling.program import Solution, value
from stabilitykit.scaling.trace import Graph, Parameter

_FARTHEST = 6  # the largest exponent that is drawn, of a parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    model: nn.Module
    traced: Traced
    solution: Solution


@functools.cache
def solved(name: str) -> Solved:
    """The entry of this name, with the scaling that leaves it its margin."""
    entry = ENTRIES[name]
    model = entry.model()
    traced = look(model, copy.deepcopy(model).bfloat16(), [entry.run], entry.blueprint())
    return Solved(model=model, traced=traced, solution=traced.solve(margin=entry.margin))


def drawn(graph: Graph, settings: Mapping[str, Any], seed: int, farthest: int = _FARTHEST) -> Scaling:
    """A vertex of the space that the equations leave, far from 0 in a random direction; integers stay integers.

    Found with the equations alone, apart from the program that chooses a repair.
    """
    exponents = graph.exponents
    count = len(exponents.unknowns)
    equations = np.zeros((len(exponents.equations) + len(graph.integral), count + len(graph.integral)))
    for row, expression in enumerate([*exponents.equations, *graph.integral]):
        for unknown, coefficient in exponents.terms(expression):
            equations[row, unknown] = float(coefficient)
    for place in range(len(graph.integral)):  # what must come out an integer is one more
        equations[len(exponents.equations) + place, count + place] = -1.0
    high = np.full(equations.shape[1], 200.0)
    for number, one in enumerate(exponents.unknowns):
        if one.kind != "filled":
            high[number] = {"parameter": farthest, "setting": 40}[one.kind]
    low = -high
    for parameter in graph.parameters.values():
        for expression in parameter.expressions:
            ((unknown, _),) = exponents.terms(expression)
            if not parameter.used:
                low[unknown] = high[unknown] = 0.0
    for key, expression in graph.settings.items():
        ((unknown, coefficient),) = exponents.terms(expression)
        whole = settings.get(key)
        if isinstance(whole, int):  # so many times it can be halved
            low[unknown] = -(((whole & -whole).bit_length() - 1) // float(coefficient))
    direction = np.random.default_rng(seed).standard_normal(len(high))
    direction[count:] = 0.0
    found = milp(
        direction,
        constraints=LinearConstraint(equations, 0.0, 0.0),
        integrality=np.ones(len(high)),
        bounds=Bounds(low, high),
        options={"mip_rel_gap": 0.1},
    )
    values = [int(one) for one in np.rint(found.x[:count])]
    return Scaling(
        parameters={name: _factor(graph, one, values) for name, one in graph.parameters.items()},
        settings={key: value(graph, values, one) for key, one in graph.settings.items()},
    )


def _factor(graph: Graph, parameter: Parameter, values: list[int]) -> Factor:
    """With an entry for each index along the dimension that is cut, whether it is another block or not."""
    several = [value(graph, values, one) for one in parameter.expressions]
    added = parameter.added or 0.0
    if len(several) == 1:
        return Factor(exponents=(several[0],), added=added)
    each = tuple(several[number] for number in parameter.blocks)
    return Factor(exponents=each, ends={parameter.dim: tuple(range(1, len(each) + 1))}, added=added)
