"""An eps that float16 does not round to zero."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.formats import number_format
from stabilitykit.models.operators import OperatorMode, Traits
from stabilitykit.trials.attributes import attribute
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import Situation
from stabilitykit.words import number

NAME = "larger eps"
_ADDS = ("add", "clamp", "clamp_min", "maximum", "sub")
_POLES = ("division-by-zero", "invalid", "overflow")
_DIVIDES = ("div", "reciprocal", "rsqrt")


def larger_eps(situation: Situation) -> Iterator[Candidate]:
    """Where something is divided by zero, or by something tiny, in 16 bits."""
    broke = situation.broke
    if broke is None or broke.broke is None or situation.kind not in _POLES or situation.is_outside:
        return
    if situation.kind == "overflow" and broke.operator not in _DIVIDES:
        return
    low = situation.reproduction.dtype
    if low not in ("float16", "bfloat16"):
        return
    eps = number_format(low).smallest_normal if low == "float16" else 1e-6
    names = list(dict.fromkeys(name for module in situation.model.modules() for name in _small(module, eps)))
    least = f", the least normal number of {low}" if low == "float16" else ""
    yield Candidate(
        name=NAME,
        lossy=True,
        summary=f"Every eps below {number(eps)} becomes {number(eps)}{least}.",
        command=f"for module in model.modules():\n    for name in {names}:\n"
        f"        if hasattr(module, name): setattr(module, name, {eps:.3g})"
        if names
        else f"# in the model's code: {eps:.3g} in the place of every smaller eps",
        around=partial(_around, eps, getattr(torch, low)),
    )


def _small(module: nn.Module, eps: float) -> Iterator[str]:
    """The names under which a module holds a smaller one."""
    for name, value in vars(module).items():
        if isinstance(value, float) and "eps" in name and 0 < value < eps:
            yield name


@contextmanager
def _around(eps: float, dtype: torch.dtype, model: nn.Module) -> Iterator[None]:
    """Raises what modules hold under such a name, and what the code adds to a tensor of `dtype`."""

    def run(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kind.name in _ADDS and args and isinstance(args[0], Tensor) and args[0].dtype == dtype:
            args = (args[0], *(_raised(one, eps) for one in args[1:]))
        return kind.func(*args, **kwargs)

    with ExitStack() as stack:
        for module in model.modules():
            for name in list(_small(module, eps)):
                stack.enter_context(attribute(module, name, eps))
        stack.enter_context(OperatorMode(run))
        yield


def _raised(value: Any, eps: float) -> Any:
    if isinstance(value, float) and 0 < value < eps:
        return eps
    if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point() and 0 <= float(value) < eps:
        return torch.full_like(value, eps)
    return value
