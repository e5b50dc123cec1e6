"""What a cause is: its name, what happened, and what to do about it."""

from dataclasses import dataclass
from typing import Literal

CauseName = Literal[
    "range",
    "harmless",
    "int8-scalers-dropped",
    "parameter-names",
    "top-k",
    "top-p",
    "temperature",
    "processor",
    "masked-row",
    "weights",
    "input",
    "constant",
    "rounding",
    "labels",
    "invalid-operation",
    "outside",
    "backward",
    "unresolved",
]


@dataclass(frozen=True, slots=True)
class Cause:
    """`sentence` says what happened, `remedy` what to do about it. `shown`: a verdict says the sentence too."""

    name: CauseName
    sentence: str
    remedy: str
    shown: bool = True
