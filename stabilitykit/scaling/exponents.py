"""Exponents of tensors as linear expressions in integer unknowns, and the equations between them.

A model stays the same function when its parameters are multiplied by powers of two in such a way that every operator
still gets operands, and the model's caller results, of the right scale. The exponent of an activation is then a sum of
those of the parameters that it was made with; it has no unknown of its own. Expressions are interned: an expression is
an int, equal ints are equal expressions, and 0 is the exponent 0.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Expression = int
Kind = Literal["parameter", "setting", "filled"]
Term = tuple[int, Fraction]  # an unknown's number, its coefficient
Softness = Literal["", "eps", "bound"]

ZERO: Expression = 0


@dataclass(frozen=True, slots=True)
class Unknown:
    """An integer to be chosen: a parameter's exponent or that of a block of it, a config setting's, or that of a tensor
    filled with zeros or infinities, which has any.
    """

    name: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Equation:
    """`expression` must be 0. `why` says so in words, `site` where.

    `softness` is what an approximate repair may give up: "eps" where a constant beside a mean of squares would not
    follow, "bound" where a small lower bound would not. All others change the function altogether.
    """

    expression: Expression
    site: str
    why: str
    softness: Softness = ""


class Exponents:
    """All unknowns, expressions and equations of one model."""

    def __init__(self) -> None:
        self.unknowns: list[Unknown] = []
        self.equations: dict[Expression, Equation] = {}
        self._terms: list[tuple[Term, ...]] = [()]
        self._numbers: dict[tuple[Term, ...], Expression] = {(): ZERO}
        self._made: dict[tuple[tuple[Fraction, Expression], ...], Expression] = {}

    def unknown(self, name: str, kind: Kind) -> Expression:
        self.unknowns.append(Unknown(name, kind))
        return self._intern(((len(self.unknowns) - 1, Fraction(1)),))

    def terms(self, expression: Expression) -> tuple[Term, ...]:
        return self._terms[expression]

    def combine(self, *parts: tuple[Fraction | int, Expression]) -> Expression:
        """Σ coefficient · expression."""
        key = tuple((Fraction(times), of) for times, of in parts if times and of)
        if not key:
            return ZERO
        if len(key) == 1 and key[0][0] == 1:
            return key[0][1]
        found = self._made.get(key)
        if found is None:
            sums: dict[int, Fraction] = defaultdict(Fraction)
            for times, of in key:
                for unknown, coefficient in self._terms[of]:
                    sums[unknown] += times * coefficient
            found = self._made[key] = self._intern(tuple(sorted((u, c) for u, c in sums.items() if c)))
        return found

    def times(self, factor: Fraction | int, one: Expression) -> Expression:
        return self.combine((factor, one))

    def sum(self, *several: Expression) -> Expression:
        return self.combine(*((1, one) for one in several))

    def difference(self, one: Expression, other: Expression) -> Expression:
        return self.combine((1, one), (-1, other))

    def equate(self, one: Expression, other: Expression, site: str, why: str, softness: Softness = "") -> None:
        """From here on both have one value. What is asked for twice keeps the harder of the two reasons."""
        needed = self.difference(one, other)
        if needed == ZERO:
            return
        negative = self.times(-1, needed)
        known = self.equations.get(needed) or self.equations.get(negative)
        if known is None or (known.softness and not softness):
            self.equations.pop(negative, None)
            self.equations[needed] = Equation(needed, site, why, softness)

    def in_words(self, expression: Expression) -> str:
        """`up_proj.weight + 2 · eps`, or 0."""
        return " ".join(self._words(expression)).removeprefix("+ ") or "0"

    def _words(self, expression: Expression) -> Iterator[str]:
        for unknown, coefficient in self._terms[expression]:
            size = abs(coefficient)
            yield f"{'-' if coefficient < 0 else '+'} {'' if size == 1 else f'{size} · '}{self.unknowns[unknown].name}"

    def _intern(self, terms: tuple[Term, ...]) -> Expression:
        found = self._numbers.get(terms)
        if found is None:
            found = self._numbers[terms] = len(self._terms)
            self._terms.append(terms)
        return found
