"""The residual stream in float32, all the rest in float16: twice the memory of one vector a token."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from stabilitykit.remedies.places import decoder_layers
from stabilitykit.remedies.remedy import Remedy


@contextmanager
def _around(model: nn.Module) -> Iterator[None]:
    """Widens what the first layer is given, so that every sum after it is float32, and narrows what norms return."""
    dtype = next(model.parameters()).dtype

    def widen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if args:
            return (args[0].float(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].float()}

    def narrow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(dtype)

    with ExitStack() as stack:
        first = decoder_layers(model)[0]
        stack.callback(first.register_forward_pre_hook(widen, with_kwargs=True).remove)
        for name, module in model.named_modules():
            if name.endswith("norm"):
                stack.callback(module.register_forward_hook(narrow).remove)
        yield


FLOAT32_RESIDUAL = Remedy(
    name="float32 residual",
    summary="Keeps the residual stream in float32, so that its sums cannot overflow; everything else stays float16.",
    around=_around,
    extra=lambda config, tokens: 2 * tokens * config.hidden_size,  # float32 instead of float16, one sum at a time
    exportable=False,
)
