"""What people patch into models: every sum of the residual stream cut off at float16's end."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitykit.remedies.places import decoder_layers
from stabilitykit.remedies.remedy import Remedy


class _Clamping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Clamps sums that have the residual stream's shape and dtype, while a decoder layer runs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[torch.Size] = []  # of the residual stream in the layers that are running
        self.limit = torch.finfo(dtype).max
        self.dtype = dtype

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.shapes and func in _SUMS and output.dtype == self.dtype and output.shape == self.shapes[-1]:
            return output.clamp_(-self.limit, self.limit)
        return output


_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@contextmanager
def _around(model: nn.Module) -> Iterator[None]:
    mode = _Clamping(next(model.parameters()).dtype)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        mode.shapes.append(hidden.shape)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode.shapes.pop()

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(mode)
        yield


CLAMP = Remedy(
    name="clamp",
    summary="Cuts every sum of the residual stream off at ±65,504, as patches in the wild do; what was cut is lost.",
    around=_around,
    exportable=False,
)
