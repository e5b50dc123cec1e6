"""One planted fault: what is run, and what a diagnosis of it has to say.

Whatever is expected follows from how the fault was planted, or from an independent run of the same model with plain
hooks. What cannot be known that way is left out, and not compared.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

ROOTS = {
    1: "where damage came from",
    2: "what is a mask",
    3: "damage that ends inside the model",
    4: "what a wider format would change",
    5: "advice for the site at hand",
    6: "positions, tokens and rows",
    7: "outside the model",
    8: "labels",
    9: "no interference",
    10: "numbers, names and the small print",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the damage came from. `kinds` and `names` are those that would be right; None and () are not compared."""

    kinds: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # patterns of fnmatch
    finite: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The right answer. None and () mean that it cannot be known, so nothing is compared.

    `sites` are patterns of fnmatch, in which a bracket stands for itself; without any, nothing of the model broke and
    only the words are compared. `kinds` and `operators` are all that would be right, `coarse` the kinds that are right
    where operators are not seen. `positions` and `rows` are all that broke. `value` is what the lost element would have
    been, within 2%, and `scaled` what the next operator would have made of it. `rounded` and `rounded_from` say which
    rounding made an operand zero or infinite. `unsure` names columns of which it is right to say nothing, too.

    `says` are regular expressions, of which each must match the verdict, and `never` those of which none may; both
    ignore case. `label` is what the break's label must match, if it has one. `residual`: scaling the residual stream
    is good advice here, which it is not anywhere else; `wider`: so is a wider format, although the run has one.
    """

    sites: tuple[str, ...]
    operators: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    origin: Origin | None = None
    row: int | None = None
    rows: tuple[int, ...] = ()
    position: int | None = None
    positions: tuple[int, ...] = ()
    step: int | None = None
    token: int | None = None
    channel: int | None = None
    value: float | None = None
    rounded: tuple[str, ...] = ()  # patterns of the site whose rounding made the zero or the infinity
    rounded_from: float | None = None
    no_rounding: bool = False  # no rounding had a part in it
    outcome: str | None = None
    absorbed_by: tuple[str, ...] = ()
    harmless: bool | None = None
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    label: str | None = None
    unsure: tuple[str, ...] = ()
    scaled: float | None = None
    coarse: tuple[str, ...] = ()
    residual: bool = False
    wider: bool = False

    def but(self, **changes: Any) -> "Expected":
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A model with a fault in it, and what runs it; `expected` is None for a control, in which nothing is wrong.

    `run` returns the tensors that a caller would look at. `symptom` asserts, without a recorder, that the fault does
    what it is said to do; it gets what the run returned. `record` are further arguments of `record`. `grad`: the run
    needs gradients; `raises`: it raises without a recorder, too.
    """

    model: nn.Module
    run: Callable[[Any], Any]
    expected: Expected | None
    symptom: Callable[[Any], None] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    grad: bool = False
    raises: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table: `make` builds the fault anew. `shortcoming` says why it is known not to be exact."""

    name: str
    root: int
    family: str
    make: Callable[[], Planted]
    shortcoming: str = ""

    @property
    def key(self) -> str:
        return f"{self.root}-{self.family}-{self.name}".replace(" ", "_")
