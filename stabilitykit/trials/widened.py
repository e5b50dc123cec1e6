"""One module of a model in float32, for autograd too: its inputs and its weights are cast, and what it returns."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from stabilitykit.trials.recast import NARROW


@contextmanager
def widened(module: nn.Module, *, back: bool = True) -> Iterator[None]:
    """Inside the block `module` computes in float32, forward and backward, and its weights stay as they are stored.

    `back`: what it returns is rounded to the dtype that it was given, as it is without this.
    """
    plain = module.forward
    own = "forward" in vars(module)

    def wide(*args: Any, **kwargs: Any) -> Any:
        given = next((one.dtype for one in _tensors((args, kwargs)) if one.dtype in NARROW), None)
        tensors = {name: _cast(held) for name, held in chain(module.named_parameters(), module.named_buffers())}
        module.forward = plain
        try:
            output = functional_call(module, tensors, tree_map_only(Tensor, _cast, args), _keywords(kwargs))
        finally:
            module.forward = wide
        dtype = given or next((held.dtype for held in module.parameters() if held.dtype in NARROW), None)
        if not back or dtype is None:
            return output
        return tree_map_only(Tensor, lambda one: one.to(dtype) if one.dtype == torch.float32 else one, output)

    module.forward = wide
    try:
        yield
    finally:
        if own:
            module.forward = plain
        else:
            del module.forward


def _cast(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in NARROW else tensor


def _keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = tree_map_only(Tensor, _cast, kwargs)
    return made


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
