"""What people patch into models: every sum of the residual stream is clamped to float16's range."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.models.operators import OperatorMode, Traits
from stabilitykit.remedies.places import NO_STACK, stacks
from stabilitykit.remedies.remedy import LeftOut, Remedy
from stabilitykit.remedies.seen import Seen

_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@contextmanager
def _around(model: nn.Module) -> Iterator[None]:
    """Clamps sums that have the residual stream's shape and dtype, while a layer runs."""
    dtype = next(model.parameters()).dtype
    maximum = torch.finfo(dtype).max
    shapes: list[torch.Size] = []  # of the residual stream in the layers that are running

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        shapes.append(hidden.shape[-3:])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        shapes.pop()

    def run(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = kind.func(*args, **kwargs)
        if shapes and kind.func in _SUMS and output.dtype == dtype and output.shape[-3:] == shapes[-1]:
            return output.clamp_(-maximum, maximum)
        return output

    with ExitStack() as stack:
        for layer in (layer for layers in stacks(model) for layer in layers):
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(OperatorMode(run))
        yield


CLAMP = Remedy(
    name="clamp",
    summary="Clamps every sum of the residual stream to ±65,504, as published patches do; what exceeds it is lost.",
    around=_around,
    exportable=False,
    lossy=True,
)


def clamp(seen: Seen) -> Remedy | LeftOut:
    """For models with a list of layers."""
    return CLAMP if stacks(seen.model) else LeftOut(CLAMP.name, NO_STACK)
