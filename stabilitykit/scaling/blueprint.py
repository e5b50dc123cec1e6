"""Which attribute of which module follows which setting of a config: found by changing settings, not by their names."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn

_SCALES = re.compile(r"scal|multiplier")  # integers that are scales: query_pre_attn_scalar
_NEVER = re.compile(r"theta|dropout|_drop|pdrop|initializer|_std$|coef|temperature|momentum|jitter|freq|rope|factor")
_POWERS = tuple({Fraction(n, d) for d in (1, 2) for n in (1, -1, 2, -2, 3, -3)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """How a model is built: its config as nested `settings`, and `build`, which makes it of changed ones.

    `build` is called on the meta device, where it costs no memory. It may raise for settings that it does not allow.
    """

    settings: Mapping[str, Any]
    build: Callable[[Mapping[str, Any]], nn.Module]


@dataclass(frozen=True, slots=True)
class Follows:
    """An attribute is proportional to the config setting at the dotted `key`, to the `power`."""

    key: str
    power: Fraction


def followers(model: nn.Module, blueprint: Blueprint | None) -> dict[tuple[str, str], Follows]:
    """By module path and attribute name, the numbers in `model` that follow one setting of its config.

    Every candidate is multiplied by a factor of its own, and the model is built once: by how much an attribute changed
    tells which setting it follows, and how. Where that cannot be built, they are changed one by one.
    """
    if blueprint is None:
        return {}
    factors = {
        key: 1 + (place + 1) / 64 if isinstance(value, float) else (value + place + 1) / value
        for place, (key, value) in enumerate(_candidates(blueprint.settings))
    }
    before = dict(_numbers(model))
    together = _built(blueprint, factors)
    if together is not None:
        return _told(before, dict(_numbers(together)), factors)
    found: dict[tuple[str, str], Follows] = {}
    for key, factor in factors.items():
        one = _built(blueprint, {key: factor})
        if one is not None:
            found |= _told(before, dict(_numbers(one)), {key: factor})
    return found


def _candidates(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float | int]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _candidates(value, f"{path}{key}.")
        elif isinstance(value, bool) or _NEVER.search(f"{path}{key}"):
            continue
        elif (isinstance(value, float) or (isinstance(value, int) and _SCALES.search(key))) and 0 < value < math.inf:
            yield f"{path}{key}", value


def _built(blueprint: Blueprint, factors: Mapping[str, float]) -> nn.Module | None:
    changed = _changed(blueprint.settings, factors)
    try:
        with torch.device("meta"):
            return blueprint.build(changed)
    except Exception:  # whatever a config class makes of a number that it does not allow
        return None


def _changed(settings: Mapping[str, Any], factors: Mapping[str, float], path: str = "") -> dict[str, Any]:
    return {
        key: _changed(value, factors, f"{path}{key}.")
        if isinstance(value, Mapping)
        else _times(value, factors.get(f"{path}{key}", 1))
        for key, value in settings.items()
    }


def _times(value: Any, factor: float) -> Any:
    """A setting that is an integer stays one."""
    return value if factor == 1 else value * factor if isinstance(value, float) else round(value * factor)


def _numbers(model: nn.Module) -> Iterator[tuple[tuple[str, str], float]]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, float):
                yield (path, name), value


def _told(
    before: Mapping[tuple[str, str], float],
    after: Mapping[tuple[str, str], float],
    factors: Mapping[str, float],
) -> dict[tuple[str, str], Follows]:
    found = {}
    for place, value in before.items():
        other = after.get(place, value)
        if value == other or not (value and other) or value * other < 0:
            continue
        ratio = math.log(other / value)
        fitting = [
            Follows(key, power)
            for key, factor in factors.items()
            for power in _POWERS
            if math.isclose(ratio, float(power) * math.log(factor), rel_tol=1e-9)
        ]
        if len(fitting) == 1:
            found[place] = fitting[0]
    return found
