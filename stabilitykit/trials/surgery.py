"""Operators changed where they run, by site: what a person would try by editing one line of the model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stabilitykit.models.operators import OperatorMode, Traits
from stabilitykit.recorder.names import Names

Operate = Callable[[Traits, tuple[Any, ...], dict[str, Any], Any], Any]
"""Gets an operator, its arguments, and its result; returns what takes the result's place."""


@contextmanager
def changed(model: nn.Module, at: Mapping[str, Operate]) -> Iterator[None]:
    """Inside the block the operators at these sites, named by their own names, are given to a function each."""
    names = Names(model)

    def run(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept = args
        if kind.writes_in_place and kind.combines:  # what is combined is about to be written over
            kept = tree_map_only(Tensor, torch.clone, args)
        output = kind.func(*args, **kwargs)
        site = names.of_operator(kind, args, kwargs, output)
        operate = None if site is None else at.get(site)
        if operate is None:
            return output
        made = operate(kind, kept, kwargs, output)
        if kind.writes_in_place and isinstance(output, Tensor) and isinstance(made, Tensor):
            return output.copy_(made)
        return names.same(made, output) if isinstance(made, Tensor) and isinstance(output, Tensor) else made

    with ExitStack() as stack:
        names.attach(stack)
        stack.enter_context(OperatorMode(run))
        yield
