"""Faults that can be planted in any linear layer: a chosen output at one position, and none at the others.

A weight row w with w · x = value at the chosen position and 0 at all others is the pseudoinverse of what the layer is
given there, in float64. So what breaks, where, and with what value is known without running the fault.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Run = Callable[[Any], Any]

MAXIMUM = 65504.0


def given(model: nn.Module, path: str, run: Run) -> Tensor:
    """What the module at `path` is given, in float64: the last dimension stays, all others and all calls are joined."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        run(model)
    hook.remove()
    return torch.cat([one.double().flatten(0, -2) for one in seen])


def rows_of(linear: nn.Module) -> Tensor:
    """The weight with one row for each output, as a view that can be written to."""
    weight: Any = linear.weight.data
    rows: Tensor = weight.T if isinstance(linear, Conv1D) else weight
    return rows


def answer(model: nn.Module, path: str, run: Run, wanted: dict[int, float], channel: int = 0) -> None:
    """Makes output `channel` of the linear layer at `path` be `wanted` at those (joined) places, 0 at the others."""
    x = given(model, path, run)
    target = torch.zeros(len(x), dtype=torch.float64)
    for place, value in wanted.items():
        target[place] = value
    linear = model.get_submodule(path)
    row = torch.linalg.lstsq(x, target[:, None], driver="gelsd").solution[:, 0]
    assert torch.allclose(x @ row, target, rtol=1e-3, atol=1.0), f"{path} cannot tell these places apart"
    rows_of(linear)[channel] = row.to(linear.weight.dtype)
    if getattr(linear, "bias", None) is not None:
        linear.bias.data[channel] = 0.0


def lost_places(model: nn.Module, path: str, run: Run, *, inputs: bool = False, call: int = 0) -> list[tuple[int, ...]]:
    """Where what the module at `path` returns (or is given) is not finite."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept = args[0] if inputs else output
        seen.append((kept[0] if isinstance(kept, tuple) else kept).detach().clone())

    handle = model.get_submodule(path).register_forward_hook(hook)
    with torch.inference_mode():
        run(model)
    handle.remove()
    return [tuple(place) for place in (~seen[call].isfinite()).nonzero().tolist()]


def only_at(places: list[tuple[int, ...]], position: int, channel: int | None = None) -> None:
    """All of these are at this position (the last but one dimension), and in this channel."""
    assert places, "nothing broke"
    assert {place[-2] for place in places} == {position}, places
    if channel is not None:
        assert {place[-1] for place in places} == {channel}, places
