"""The axes of an experiment: what each is called, what it may be, and what it is when nothing is said.

A table of an experiment's file names axes and their values, and they multiply. `GRID` are those of prompts that run,
`MEMORY`, `SHORTAGE` and `FOOTPRINT` those of what is measured or computed beside them.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from stabilitykit.checkpoints.config import ALIASES, RELEASED
from stabilitykit.models.devices import DTYPES
from stabilitykit.models.gemma.model import ROUNDINGS
from stabilitykit.models.matmul import KINDS, check_matmul
from stabilitykit.records import Level
from stabilitykit.records.sweep import USUAL
from stabilitykit.scaling.stress import check_gamma

LENGTHS = 'a number of tokens, "up to 2000" where a text may be shorter, a range "1..4096" of them, or "all"'

_RANGE = re.compile(r"1\.\.([1-9][0-9]*)")
_UP_TO = re.compile(r"up to ([1-9][0-9]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """`read` gives the value as a case keeps it, and raises ValueError for one that is not `allowed`."""

    default: Any
    allowed: str
    read: Callable[[Any], Any]


def longest(length: int | str) -> int | None:
    """The number of tokens of a length's longest run; None for "all"."""
    found = _RANGE.fullmatch(str(length)) or _UP_TO.fullmatch(str(length))
    if found:
        return int(found[1])
    return None if length == "all" else int(length)


def is_range(length: int | str) -> bool:
    """Whether a length stands for every one up to it."""
    return bool(_RANGE.fullmatch(str(length)))


def is_up_to(length: int | str) -> bool:
    """Whether a text that is shorter runs whole."""
    return bool(_UP_TO.fullmatch(str(length)))


def _one_of(names: Sequence[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return read


def _length(value: Any) -> int | str:
    if value == "all" or (isinstance(value, str) and (is_range(value) or is_up_to(value))):
        return str(value)
    return _count(value)


def _count(value: Any) -> int:
    return _whole(value, least=1)


def _whole(value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _rescale(value: Any) -> float:
    check_gamma(_number(value))
    return float(value)


def _temperature(value: Any) -> float:
    if _number(value) < 0:
        raise ValueError
    return float(value)


def _product(value: Any) -> str:
    return "auto" if value == "auto" else check_matmul(_text(value))


def _share(value: Any) -> float:
    if not 0 < _number(value) <= 2:
        raise ValueError
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _size(value: Any) -> str:
    return ALIASES.get(str(value), _one_of([*RELEASED, *ALIASES])(value))


_DTYPE = Axis(default="float16", allowed=" or ".join(DTYPES), read=_one_of(list(DTYPES)))
_TOKENS = Axis(default=128, allowed="a number of tokens", read=_count)

GRID: Mapping[str, Axis] = {
    "prompt": Axis(default="prose", allowed="the name of a text", read=_text),
    "length": Axis(default="all", allowed=LENGTHS, read=_length),
    "bos": Axis(default=True, allowed="true or false", read=_flag),
    "dtype": _DTYPE,
    "rescale": Axis(default=USUAL["rescale"], allowed="a power of two from 2^-24 to 2^24", read=_rescale),
    "level": Axis(default=USUAL["level"], allowed=" or ".join(get_args(Level)), read=_one_of(get_args(Level))),
    "rounding": Axis(default=USUAL["rounding"], allowed=" or ".join(ROUNDINGS), read=_one_of(list(ROUNDINGS))),
    "temperature": Axis(default=USUAL["temperature"], allowed="0 (greedy) or a positive number", read=_temperature),
    "seed": Axis(default=USUAL["seed"], allowed="a whole number from 0 on", read=_whole),
    "matmul": Axis(
        default=USUAL["matmul"],
        allowed=f"auto, {KINDS}",
        read=_product,
    ),
}

MEMORY: Mapping[str, Axis] = {"dtype": _DTYPE, "length": _TOKENS}

SHORTAGE: Mapping[str, Axis] = {
    **MEMORY,
    "room": Axis(default=0.5, allowed="a share of what the prompt needs, above 0 and up to 2", read=_share),
}

FOOTPRINT: Mapping[str, Axis] = {
    "model": Axis(default="gemma-7b", allowed=" or ".join(RELEASED), read=_size),
    **MEMORY,
    "device": Axis(default="cuda", allowed="cpu or cuda", read=_one_of(["cpu", "cuda"])),
}
