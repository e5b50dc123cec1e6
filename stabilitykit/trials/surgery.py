"""Operators changed where they run, by the module that runs them: what a person would try by editing its code."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from stabilitykit.models.operators import OperatorMode, Traits
from stabilitykit.recorder.names import Names

Operate = Callable[[Traits, tuple[Any, ...], dict[str, Any]], Any]
"""Runs an operator, changed or not, and returns its result."""


@contextmanager
def inside(model: nn.Module, chosen: Callable[[str], bool], operate: Operate) -> Iterator[None]:
    """Inside the block `operate` runs the operators of the modules whose paths, as sites have them, are `chosen`.

    An operator belongs to the innermost module that runs it; "outside" is the path of what runs in none.
    """
    names = Names(model)

    def run(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if chosen(names.frames[-1].path):
            return operate(kind, args, kwargs)
        return kind.func(*args, **kwargs)

    with ExitStack() as stack:
        names.attach(stack)
        stack.enter_context(OperatorMode(run))
        yield
