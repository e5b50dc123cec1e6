"""The residual stream in float32, all the rest in float16: twice the memory of one vector a token."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stabilitykit.remedies.float32_norms import in_float32
from stabilitykit.remedies.places import NO_STACK, norms, stacks, width
from stabilitykit.remedies.remedy import LeftOut, Remedy
from stabilitykit.remedies.seen import Seen

_FUSED = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # torch's own take weights in their input's dtype only


@contextmanager
def _around(model: nn.Module) -> Iterator[None]:
    """Widens what the first layer of each stack is given, so that every sum after it is float32, and narrows what norms
    return and what products are given.
    """
    dtype = next(model.parameters()).dtype

    def widened(tree: Any) -> Any:
        return tree_map_only(Tensor, lambda one: one.float() if one.dtype == dtype else one, tree)

    def narrowed(tree: Any) -> Any:
        return tree_map_only(Tensor, lambda one: one.to(dtype) if one.dtype == torch.float32 else one, tree)

    def is_low(module: nn.Module) -> bool:
        return any(one.dtype == dtype for one in module.parameters(recurse=False))

    def widen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if args:
            return (widened(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": widened(kwargs["hidden_states"])}

    def narrow_given(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return narrowed(args)

    def narrow_made(module: nn.Module, args: Any, output: Any) -> Any:
        return narrowed(output)

    found = norms(model)
    layers = [layer for layers in stacks(model) for layer in layers]
    with ExitStack() as stack:
        for first in (one[0] for one in stacks(model)):
            stack.callback(first.register_forward_pre_hook(widen, with_kwargs=True).remove)
        for module in found:
            stack.callback(module.register_forward_hook(narrow_made).remove)
            if isinstance(module, _FUSED):
                stack.enter_context(in_float32(module))
        for module in model.modules():
            if module not in found and module not in layers and is_low(module):
                stack.callback(module.register_forward_pre_hook(narrow_given).remove)
        yield


FLOAT32_RESIDUAL = Remedy(
    name="float32 residual",
    summary="Keeps the residual stream in float32, so that its sums cannot overflow; everything else stays float16.",
    around=_around,
    exportable=False,
)


def float32_residual(seen: Seen) -> Remedy | LeftOut:
    """For models with a list of layers."""
    if not stacks(seen.model):
        return LeftOut(FLOAT32_RESIDUAL.name, NO_STACK)
    return replace(FLOAT32_RESIDUAL, extra=partial(_extra, width(seen.model)))


def _extra(channels: int, tokens: int) -> int:
    return 2 * tokens * channels  # float32 instead of float16, one sum at a time
