"""The integer program: exponents that keep the function, bring every tensor under the maximum, and cost least."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stabilitykit.formats import FLOAT16, NumberFormat
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.scaling.exponents import ZERO, Equation, Expression
from stabilitykit.scaling.peaks import Peaks
from stabilitykit.scaling.shadows import values
from stabilitykit.scaling.trace import Graph, Parameter
from stabilitykit.scaling.weights import FIRST, Magnitudes

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_LARGEST = {"parameter": 30, "setting": 60, "filled": 200}  # magnitudes of exponents
_GIVEN_UP = 30.0  # what a bit costs by which an equation is given up
# What an exponent of one costs: of a weight a little, so that no weight is changed in vain; of a gain c + w more, for
# 2^e (c + w) - c is stored with an absolute error of its own, near -c.
_MOVED, _GAIN, _EPS, _SETTING = 1.0, 5.0, 0.1, 3.0
_TENSOR = 0.01  # and of a tensor of a run, to decide between equals
_SMALL = 1e-2  # below which a setting is an eps
_EPS_BIT = 2.0  # what a bit costs by which an eps falls below the smallest number of the format
_HULL = 24  # a weight's share of subnormals is looked at down to 2^-24
_PER_MILLE = 1000.0
_TOLERANCE = 1e-6


class UnsolvableError(ArithmeticError):
    """No integers satisfy the equations together with what is fixed."""


@dataclass(frozen=True, slots=True)
class Short:
    """A tensor that stays above the limit, by so many bits. `movable`: an exponent can change it at all."""

    site: str
    peak: float
    bits: float
    movable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """`scaling` satisfies every equation but those that are `given_up`; `short` are tensors that lack headroom.

    `exponents` are the unknowns' values. `moved` counts parameters that change. Counts are those of the program.
    """

    scaling: Scaling
    exponents: tuple[int, ...]
    short: tuple[Short, ...]
    given_up: tuple[Equation, ...]
    moved: int
    unknowns: int
    equations: int
    peaks: int

    @property
    def is_exact(self) -> bool:
        """Whether every equation holds and every tensor is within the margin."""
        return not self.short and not self.given_up

    def of(self, graph: Graph, expression: Expression) -> int:
        return value(graph, self.exponents, expression)


def value(graph: Graph, exponents: Sequence[int], expression: Expression) -> int:
    """An expression's value; what is no integer cannot be a power of two."""
    found = sum((coefficient * exponents[of] for of, coefficient in graph.exponents.terms(expression)), Fraction(0))
    assert found.denominator == 1, graph.exponents.in_words(expression)
    return int(found)


@dataclass(slots=True)
class _Columns:
    """Rows of a linear program under construction."""

    width: int
    data: list[float] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    column: list[int] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        for column, coefficient in terms:
            self.row.append(len(self.low))
            self.column.append(column)
            self.data.append(coefficient)
        self.low.append(low)
        self.high.append(high)

    def new(self) -> int:
        self.width += 1
        return self.width - 1

    def matrix(self) -> "csr_array":
        from scipy.sparse import csr_array

        return csr_array((self.data, (self.row, self.column)), shape=(len(self.low), self.width))


def solve(
    graph: Graph,
    peaks: Peaks,
    weights: Mapping[str, Sequence[Magnitudes]],
    *,
    settings: Mapping[str, float] | None = None,
    target: NumberFormat = FLOAT16,
    margin: float = 1.0,
    fixed: Mapping[str, int] | None = None,
    limited: bool = True,
    soft: bool = False,
) -> Solution:
    """The exponents that cost least among those that leave `margin` bits of headroom everywhere, or lack the fewest.

    Raises UnsolvableError where `fixed` contradicts the equations.

    Args:
        graph: the trace.
        peaks: the largest float32 magnitudes by exponent, as `measure` returns.
        weights: by parameter, its blocks' magnitudes.
        settings: by key, the values of the config's settings, of which an eps costs where `target` cannot hold it.
        target: what tensors and weights are stored in.
        margin: bits.
        fixed: exponents of parameters, by name, that are given.
        limited: whether tensors have to fit; without it `fixed` alone decides, as for a model made to overflow.
        soft: whether equations that are only approximately needed may be given up, at a price.
    """
    problem = _Problem(graph, target, margin)
    equations = graph.exponents.equations.values()
    problem.hold([one for one in equations if not (soft and one.softness)])
    if soft:
        problem.may_give_up([one for one in equations if one.softness])
    problem.bound(weights, fixed or {}, settings or {})
    problem.keep()
    if limited:
        problem.limit(peaks)
    found = problem.solved()
    return problem.solution(found, peaks if limited else {})


class _Problem:
    def __init__(self, graph: Graph, target: NumberFormat, margin: float) -> None:
        self.graph = graph
        self.target = target
        self.margin = margin
        unknowns = graph.exponents.unknowns
        self.rows = _Columns(len(unknowns))
        self.cost: dict[int, float] = {}
        self.low = [-float(_LARGEST[one.kind]) for one in unknowns]
        self.high = [float(_LARGEST[one.kind]) for one in unknowns]
        self.integers = set(range(len(unknowns)))
        self.short: list[int] = []  # by how many bits a tensor lacks its margin
        self.soft: list[tuple[int, int, Equation]] = []  # by how much more, by how much less, of what
        for expression in sorted(graph.integral):
            whole = self.column(-math.inf, math.inf)
            self.integers.add(whole)
            self.rows.add([*self.terms(expression), (whole, -1.0)], 0.0, 0.0)

    def column(self, low: float, high: float, cost: float = 0.0) -> int:
        self.low.append(low)
        self.high.append(high)
        column = self.rows.new()
        if cost:
            self.cost[column] = cost
        return column

    def terms(self, expression: Expression) -> list[tuple[int, float]]:
        return [(of, float(coefficient)) for of, coefficient in self.graph.exponents.terms(expression)]

    def hold(self, equations: Sequence[Equation]) -> None:
        for one in equations:
            self.rows.add(self.terms(one.expression), 0.0, 0.0)

    def may_give_up(self, equations: Sequence[Equation]) -> None:
        for one in equations:
            more, less = (self.column(0.0, math.inf, _GIVEN_UP) for _ in range(2))
            self.rows.add([*self.terms(one.expression), (more, -1.0), (less, 1.0)], 0.0, 0.0)
            self.soft.append((more, less, one))

    def bound(
        self,
        weights: Mapping[str, Sequence[Magnitudes]],
        fixed: Mapping[str, int],
        settings: Mapping[str, float],
    ) -> None:
        """Limits of single unknowns, and what changing them costs."""
        total = max(1, sum(int(one.exponents.sum()) for blocks in weights.values() for one in blocks))
        for name, parameter in self.graph.parameters.items():
            for number, expression in enumerate(parameter.expressions):
                ((unknown, _),) = self.graph.exponents.terms(expression)
                if not parameter.used:
                    self.low[unknown] = self.high[unknown] = 0.0
                if name in fixed:
                    self.low[unknown] = self.high[unknown] = float(fixed[name])
                self._pay(unknown, _MOVED if parameter.added is None else _GAIN)
                if name in weights:
                    self._of_weight(unknown, weights[name][number], total, fixed=name in fixed)
        for key, expression in self.graph.settings.items():
            ((unknown, coefficient),) = self.graph.exponents.terms(expression)
            value = settings.get(key, 0.0)
            self._pay(unknown, _EPS if value < _SMALL else _SETTING)
            if isinstance(value, int):  # it stays one
                self.low[unknown] = max(
                    self.low[unknown], -float((value & -value).bit_length() - 1) / float(coefficient)
                )
            elif 0 < value < _SMALL:
                below = self.column(0.0, math.inf, _EPS_BIT)
                room = math.log2(value) - math.log2(self.target.smallest_subnormal)
                self.rows.add([(below, 1.0), (unknown, float(coefficient))], -room, math.inf)

    def _pay(self, unknown: int, price: float) -> None:
        size = self.column(0.0, math.inf, price)
        self.rows.add([(size, 1.0), (unknown, -1.0)], 0.0, math.inf)
        self.rows.add([(size, 1.0), (unknown, 1.0)], 0.0, math.inf)

    def _of_weight(self, unknown: int, weight: Magnitudes, total: int, *, fixed: bool) -> None:
        """It has to fit; and what becomes subnormal costs, by the convex hull of its share over the exponents."""
        if weight.largest > 0 and not fixed:
            room = math.floor(math.log2(self.target.largest) - math.log2(weight.largest))
            self.high[unknown] = max(min(self.high[unknown], float(room)), self.low[unknown])
        cumulative = np.cumsum(weight.exponents)
        edge = self.target.emin - FIRST  # the first exponent that is normal
        share = [
            (e, _PER_MILLE * float(cumulative[min(max(edge - e - 1, 0), len(cumulative) - 1)]) / total)
            for e in range(-_HULL, 1)
        ]
        slopes = [
            ((high - low) / (right - left), left, low)
            for (left, low), (right, high) in _hull_sides(share)
            if high != low
        ]
        if slopes:
            lost = self.column(0.0, math.inf, 1.0)
            for slope, left, low in slopes:
                self.rows.add([(lost, 1.0), (unknown, -slope)], low - slope * left, math.inf)

    def keep(self) -> None:
        """Of two scalings that cost the same, the one that changes fewer tensors of a run."""
        for expression in sorted({one for stored in self.graph.stored.values() for one in values(stored.shadow)}):
            if expression != ZERO:
                size = self.column(0.0, math.inf, _TENSOR)
                for sign in (1.0, -1.0):
                    terms = [(of, -sign * coefficient) for of, coefficient in self.terms(expression)]
                    self.rows.add([(size, 1.0), *terms], 0.0, math.inf)

    def limit(self, peaks: Peaks) -> None:
        for expression, (peak, _) in peaks.items():
            if expression != ZERO and peak > 0:
                short = self.column(0.0, math.inf)
                self.short.append(short)
                whole = math.floor(self.room(peak) + _TOLERANCE)  # exponents are, so a shortage is at least a bit
                self.rows.add([*self.terms(expression), (short, -1.0)], -math.inf, whole)

    def room(self, peak: float) -> float:
        """By how many bits a tensor with this peak may grow."""
        return math.log2(self.target.largest) - self.margin - math.log2(peak)

    def solved(self, *, in_integers: bool = True) -> NDArray[np.float64]:
        """What lacks the fewest bits, and of that what costs least."""
        if self.short:
            lacking = self._least(dict.fromkeys(self.short, 1.0), in_integers)
            most = float(np.rint(lacking[self.short].sum())) if in_integers else float(lacking[self.short].sum())
            self.rows.add([(column, 1.0) for column in self.short], -math.inf, most + _TOLERANCE)
        return self._least(self.cost, in_integers)

    def _least(self, prices: Mapping[int, float], in_integers: bool) -> NDArray[np.float64]:
        from scipy.optimize import Bounds, LinearConstraint, milp  # most of a second, only to solve

        costs = np.zeros(self.rows.width)
        for column, price in prices.items():
            costs[column] = price
        integral = np.zeros(self.rows.width)
        integral[list(self.integers)] = in_integers
        found = milp(
            costs,
            constraints=LinearConstraint(self.rows.matrix(), self.rows.low, self.rows.high),
            integrality=integral,
            bounds=Bounds(np.array(self.low), np.array(self.high)),
            options={"mip_rel_gap": 0.01, "time_limit": 120},
        )
        if found.x is None:
            raise UnsolvableError(f"The program of a scaling has no solution: {found.message}")
        return np.asarray(found.x)

    def solution(self, found: NDArray[np.float64], peaks: Peaks) -> Solution:
        graph = self.graph
        exponents = tuple(int(one) for one in np.rint(found[: len(graph.exponents.unknowns)]))
        given_up = tuple(one for more, less, one in self.soft if found[more] + found[less] > _TOLERANCE)
        dropped = {one.expression for one in given_up}
        for one in graph.exponents.equations.values():  # in integers, whatever the solver's tolerance is
            assert one.expression in dropped or value(graph, exponents, one.expression) == 0, one
        parameters = {
            name: factor for name, one in graph.parameters.items() if (factor := _factor(graph, one, exponents))
        }
        settings = {key: number for key, one in graph.settings.items() if (number := value(graph, exponents, one))}
        return Solution(
            scaling=Scaling(parameters=parameters, settings=settings),
            exponents=exponents,
            short=tuple(self._short(peaks, exponents)),
            given_up=given_up,
            moved=len(parameters),
            unknowns=len(graph.exponents.unknowns),
            equations=len(graph.exponents.equations),
            peaks=len(peaks),
        )

    def _short(self, peaks: Peaks, exponents: Sequence[int]) -> Iterator[Short]:
        for expression, (peak, site) in peaks.items():
            if peak > 0:
                lacking = value(self.graph, exponents, expression) - self.room(peak)
                if lacking > _TOLERANCE:
                    yield Short(site, peak, lacking, expression != ZERO)


def _factor(graph: Graph, parameter: Parameter, exponents: Sequence[int]) -> Factor | None:
    """None for a parameter that stays as it is."""
    several = [value(graph, exponents, one) for one in parameter.expressions]
    if not any(several):
        return None
    added = parameter.added or 0.0
    if len(set(several)) == 1:
        return Factor(exponents=(several[0],), added=added)
    each = [several[number] for number in parameter.blocks]
    ends = [place for place in range(1, len(each)) if each[place] != each[place - 1]] + [len(each)]
    return Factor(exponents=tuple(each[end - 1] for end in ends), ends={parameter.dim: tuple(ends)}, added=added)


def _hull_sides(
    points: Sequence[tuple[int, float]],
) -> Iterator[tuple[tuple[int, float], tuple[int, float]]]:
    """The sides of the lower convex hull of points in ascending order."""
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) >= 2 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    yield from pairwise(hull)


def _is_above(left: tuple[int, float], middle: tuple[int, float], right: tuple[int, float]) -> bool:
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])


def cheapest_to_give_up(
    graph: Graph,
    peaks: Peaks,
    *,
    margin: float,
    target: NumberFormat = FLOAT16,
    fixed: Mapping[str, int] | None = None,
) -> list[Equation]:
    """The equations whose violation, in bits, is least in sum if every tensor has to have its margin."""
    problem = _Problem(graph, target, margin)
    problem.bound({}, fixed or {}, {})
    equations = list(graph.exponents.equations.values())
    problem.may_give_up(equations)
    for expression, (peak, _) in peaks.items():
        if expression != ZERO and peak > 0:
            problem.rows.add(problem.terms(expression), -math.inf, problem.room(peak))
    try:
        found = problem.solved(in_integers=False)
    except UnsolvableError:
        return []
    return [one for more, less, one in problem.soft if abs(found[more] - found[less]) > _TOLERANCE]
