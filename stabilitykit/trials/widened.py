"""One module of a model in float32, for autograd too: its inputs and its weights are cast, and what it returns."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from stabilitykit.scaling.apply import tensors_by_name
from stabilitykit.trials.attributes import attribute
from stabilitykit.trials.recast import NARROW


@contextmanager
def widened(module: nn.Module, *, tensors: Mapping[str, Tensor] | None = None, back: bool = True) -> Iterator[None]:
    """Inside the block `module` computes in float32, forward and backward, and its weights stay as they are stored.

    `tensors` are computed with in the place of its weights and buffers, by name; these themselves, cast, unless given.
    `back`: what it returns is rounded to the dtype that it was given, as it is without this.
    """
    plain = module.forward

    def wide(*args: Any, **kwargs: Any) -> Any:
        own = tensors_by_name(module)
        held = {name: _cast(one) for name, one in own.items()} if tensors is None else dict(tensors)
        with attribute(module, "forward", plain):  # functional_call calls the module itself
            output = functional_call(module, held, *tree_map_only(Tensor, _cast, (args, kwargs)))
        dtype = _narrow(tree_leaves((args, kwargs))) or _narrow(own.values())
        if not back or dtype is None:
            return output
        return tree_map_only(Tensor, lambda one: one.to(dtype) if one.dtype == torch.float32 else one, output)

    with attribute(module, "forward", wide):
        yield


def _cast(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in NARROW else tensor


def _narrow(values: Any) -> torch.dtype | None:
    """The first narrow dtype among tensors."""
    return next((one.dtype for one in values if isinstance(one, Tensor) and one.dtype in NARROW), None)
