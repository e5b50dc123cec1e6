"""A weight that only float32 holds, kept in float32."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from stabilitykit.recorder.names import site_path
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.candidates.replaced import lost_in
from stabilitykit.trials.sampling import attribute
from stabilitykit.trials.situation import Situation
from stabilitykit.trials.stored import wide_model, wide_values
from stabilitykit.words import listed

NAME = "weight in float32"


def wide_weight(situation: Situation) -> Iterator[Candidate]:
    """Where weights are finite in float32, and not in the failing dtype."""
    if situation.kind != "weight" or situation.reproduction.dtype not in ("float16", "bfloat16"):
        return
    found = lost_in(situation)
    if not found or not all(math.isfinite(one) for one in wide_values(situation, found).values()):
        return
    wide = wide_model(situation)
    paths = list(dict.fromkeys(one.name.rpartition(".")[0] for one in found))
    if any(list(situation.model.get_submodule(path).children()) for path in paths):
        return
    held = {path: _tensors(wide.get_submodule(path)) for path in paths}
    low = situation.reproduction.dtype
    yield Candidate(
        name=NAME,
        summary=f"Keeps {listed([site_path(path) for path in paths], 3)} in float32, and rounds what "
        f"{'it returns' if len(paths) == 1 else 'they return'} to {low}.",
        command="\n".join(
            f"model.get_submodule({path!r}).float()  # before the cast; and cast what it is given" for path in paths
        ),
        around=partial(_around, held, getattr(torch, low)),
        extra=sum(one.numel() * 2 for tensors in held.values() for one in tensors.values()),
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@contextmanager
def _around(held: dict[str, dict[str, Tensor]], low: torch.dtype, model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for path, tensors in held.items():
            module = model.get_submodule(path)
            stack.enter_context(attribute(module, "forward", _in_float32(module, module.forward, tensors, low)))
        yield


def _in_float32(module: nn.Module, forward: Any, tensors: dict[str, Tensor], low: torch.dtype) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda one: one.float() if one.dtype == low else one, (args, kwargs))
        del vars(module)["forward"]  # functional_call calls the module itself
        try:
            output = functional_call(module, tensors, args, kwargs)
        finally:
            vars(module)["forward"] = call
        return tree_map_only(Tensor, lambda one: one.to(low) if one.dtype == torch.float32 else one, output)

    return call
