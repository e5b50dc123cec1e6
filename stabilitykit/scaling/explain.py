"""What stands in the way of an exact scaling, in sentences: the cheapest equations to give up, and what ties them."""

from collections.abc import Iterator, Sequence

import numpy as np

from stabilitykit.formats import FLOAT16, NumberFormat
from stabilitykit.scaling.exponents import Equation
from stabilitykit.scaling.look import Traced
from stabilitykit.scaling.program import Solution, cheapest_to_give_up
from stabilitykit.scaling.trace import Graph


def obstacles(traced: Traced, solution: Solution, margin: float, target: NumberFormat = FLOAT16) -> tuple[str, ...]:
    """What stands in the way of an exact scaling that leaves `margin` bits, as sentences; none where nothing does.

    The first names the tensor that stays furthest above the limit; each of the others an equation of those that could
    be given up at the least price, by where it is and why it is needed.
    """
    if not solution.short:
        return ()
    worst = max(solution.short, key=lambda one: one.bits)
    maximum = f"{target.largest:,.0f}" if target.largest >= 1e3 else f"{target.largest:g}"
    first = (
        f"{worst.site} reaches {worst.peak:,.0f}, and no exact scaling brings it and all else {margin:g} bits under "
        f"the {target.name} maximum, {maximum}: it stays {worst.bits:.1f} bits above that."
    )
    ways = _once(cheapest_to_give_up(traced.graph, traced.peaks, target=target, margin=margin))
    return (first, *(f"At {one.site}, {one.why}{_tied(traced.graph, one)}." for one in ways))


def _once(equations: Sequence[Equation]) -> Iterator[Equation]:
    seen: set[str] = set()
    for one in equations:
        if one.why not in seen:
            seen.add(one.why)
            yield one


def _tied(graph: Graph, given_up: Equation) -> str:
    """Why a setting cannot follow: another place that needs it to stay as it is, by itself."""
    settings = _settings(graph, given_up)
    if not settings:
        return ""
    equations = [one for one in graph.exponents.equations.values() if one is not given_up]
    free = [one for one in equations if not _settings(graph, one) & settings]
    for other in equations:
        if _settings(graph, other) & settings and _implied(graph, [*free, other], settings):
            return f", and {other.site} needs that as it is: what it is added to there has a scale that is given"
    return ""


def _settings(graph: Graph, equation: Equation) -> set[int]:
    terms = graph.exponents.terms(equation.expression)
    return {unknown for unknown, _ in terms if graph.exponents.unknowns[unknown].kind == "setting"}


def _implied(graph: Graph, equations: Sequence[Equation], unknowns: set[int]) -> bool:
    """Whether the equations leave these unknowns no value but 0."""
    matrix = np.zeros((len(equations), len(graph.exponents.unknowns)))
    for row, one in enumerate(equations):
        for unknown, coefficient in graph.exponents.terms(one.expression):
            matrix[row, unknown] = float(coefficient)
    zero = np.zeros((len(unknowns), matrix.shape[1]))
    zero[range(len(unknowns)), sorted(unknowns)] = 1.0
    rank = np.linalg.matrix_rank(matrix)
    return bool(np.linalg.matrix_rank(np.vstack([matrix, zero])) == rank)
