"""Slots of a cache that hold no numbers, because nothing was written to them, or something was that is none."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.models.operators import OperatorMode, Traits
from stabilitykit.recorder.inputs import inside
from stabilitykit.trials.altered import Altered
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import Situation

NAME = "zero-filled cache"
_CACHES = ("past", "cache")
_EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")


def zero_filled(situation: Situation) -> Iterator[Candidate]:
    """Where a cache that was passed was not finite, or memory that was never written was read."""
    broke = situation.broke
    if broke is None or broke.broke is None:
        return
    origin = broke.broke
    is_cache = origin.origin_kind == "cache"
    if not is_cache and origin.origin_name not in _EMPTY:
        return
    if is_cache:
        named = f" ({origin.origin_name})" if origin.origin_name else ""
        summary = f"Puts 0 into every slot of the cache{named} that holds NaN or infinities when the model is called."
        command = (
            "for layer in past_key_values.layers:\n    for held in (layer.keys, layer.values): "
            "held.nan_to_num_(0.0, 0.0, 0.0)"
        )
    else:
        summary = f"Fills with 0 the memory that {origin.origin_name} returns, of which not all is written."
        command = "# torch.zeros in place of torch.empty"
    yield Candidate(name=NAME, summary=summary, command=command, instead=Altered(situation.reproduction, _around))


@contextmanager
def _around(model: nn.Module) -> Iterator[None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [one for name, one in kwargs.items() if any(part in name for part in _CACHES)]
        given += [one for one in args if "cache" in type(one).__name__.lower()]
        with torch.no_grad():
            for _, tensor in (held for one in given for held in inside(one)):
                if tensor.is_floating_point() and tensor.element_size() > 1:
                    tensor.nan_to_num_(0.0, 0.0, 0.0)

    def run(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = kind.func(*args, **kwargs)
        if kind.name in _EMPTY and isinstance(made, Tensor):
            made.zero_()
        return made

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.enter_context(OperatorMode(run))
        yield
