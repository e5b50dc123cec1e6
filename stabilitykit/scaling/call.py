"""One operator as a rule sees it: its operands with their exponents, and what a rule may do with these."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stabilitykit.scaling.exponents import ZERO, Exponents, Expression, Softness
from stabilitykit.scaling.shadows import Shadow, elementwise, values

BEYOND = 6e4  # a constant of this magnitude stands for infinity: a mask's minimum, or a bound against overflow


@dataclass(slots=True)
class Known:
    """What a trace knows of a tensor: its exponents; the parameter of which it is a view, if that is all it is; of
    which row of which parameter's dimension its elements were made; the operator that made it, and how many ran before;
    and by which number it was multiplied last, if no setting changes that.
    """

    shadow: Shadow = ZERO
    parameter: str | None = None
    rows: "Rows | None" = None
    site: str | None = None
    at: int = 0
    constant: float | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Each element was made with the row `index` along dimension `dim` of `parameter`."""

    parameter: str
    dim: int
    index: Shadow


@dataclass(slots=True)
class Call:
    """An operator that has run. `name` is ATen's, without the overload and the mark of those that write in place.

    `site` names it, `follows(value)` is the exponent of the config setting that a constant in its innermost module
    follows, None where there is none; `known(tensor)` is what is known of an operand, `gain(name, c)` is called for a
    parameter that is used as c + w.
    """

    name: str
    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: Any
    site: str
    exponents: Exponents
    known: Callable[[Tensor], Known]
    follows: Callable[[float], Expression | None]
    gain: Callable[[str, float], None]
    operands: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.operands = numbers((self.args, dict(self.kwargs)))
        self.outputs = numbers(self.output)

    def argument(self, place: int, name: str = "", default: Any = None) -> Any:
        """What was passed at this place or by this name."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    def of(self, operand: Any) -> Shadow:
        """The exponents of a tensor; those of a number are 0."""
        return self.known(operand).shadow if is_number(operand) else ZERO

    def first(self) -> Shadow:
        return self.of(self.args[0])

    def all(self) -> list[Shadow]:
        return [self.of(operand) for operand in self.operands]

    # What rules require.

    def one(self, shadow: Shadow, why: str = "all elements that are put together need one scale") -> Expression:
        """One exponent of all elements, which is required of them."""
        first, *others = values(shadow)
        for other in others:
            self.exponents.equate(other, first, self.site, why)
        return first

    def zero(self, shadow: Shadow, why: str, softness: Softness = "") -> Expression:
        """Every element has the exponent 0, which is required of them."""
        for one in values(shadow):
            self.exponents.equate(one, ZERO, self.site, why, softness)
        return ZERO

    def equal(self, *shadows: Shadow, why: str = "what is added or chosen from needs one scale") -> Shadow:
        """The exponents of what is made element by element of several tensors, which need the same."""

        def first(*several: Expression) -> Expression:
            for other in several[1:]:
                self.exponents.equate(several[0], other, self.site, why)
            return next((one for one in several if one == ZERO), several[0])

        return elementwise(first, *shadows)

    def sum(self, *shadows: Shadow) -> Shadow:
        return elementwise(self.exponents.sum, *shadows)

    def difference(self, one: Shadow, other: Shadow) -> Shadow:
        return elementwise(self.exponents.difference, one, other)

    def times(self, factor: Fraction | int, shadow: Shadow) -> Shadow:
        return elementwise(lambda one: self.exponents.times(factor, one), shadow)

    def any_scale(self) -> Expression:
        """Of a tensor that any power of two leaves as it is: zeros and infinities."""
        return self.exponents.unknown(f"what fills {self.site}", "filled")


def is_number(value: Any) -> bool:
    """Whether it is a tensor of real or complex numbers; integers and truth values have no scale."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def numbers(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if is_number(leaf)]


def has_any_scale(value: Any) -> bool:
    """Whether a number stays what it is, or what it is for, under every power of two: 0, ±inf, a mask's minimum."""
    return value == 0 or (isinstance(value, float | int) and (math.isinf(value) or abs(value) >= BEYOND))


def is_mask(tensor: Tensor) -> bool:
    """Whether a constant tensor holds nothing but 0 and what hides: -inf or a minimum."""
    if tensor.is_complex() or tensor.is_meta or not tensor.numel():
        return False
    return bool(((tensor == 0) | (tensor <= -BEYOND)).all())


def scalar(value: Any) -> float | None:
    """A Python number, or a tensor of one that holds integers; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Tensor) and value.ndim == 0 and not is_number(value) and value.dtype != torch.bool:
        return float(value)
    return None
