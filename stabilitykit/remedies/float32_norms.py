"""Norms in float32 where they square in 16 bits, all the rest in float16.

A norm written by hand, or exported operator by operator, may square its input in the input's own dtype; in float16
300² is infinite already, and what is divided by that is 0, without a NaN to tell.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stabilitykit.remedies.places import norms, overflowing_in
from stabilitykit.remedies.remedy import LeftOut, Remedy
from stabilitykit.remedies.seen import Seen

_NAME = "float32 norms"


def float32_norms(seen: Seen) -> Remedy | LeftOut:
    """For models with a norm in which something overflows."""
    inside = set(map(id, norms(seen.model))) & set(map(id, overflowing_in(seen)))
    paths = [path for path, module in seen.model.named_modules() if id(module) in inside]
    if not paths:
        return LeftOut(_NAME, "No norm overflows inside: they square in float32, or what they square is small enough.")

    @contextmanager
    def around(model: nn.Module) -> Iterator[None]:
        modules = dict(model.named_modules())
        with ExitStack() as stack:
            for path in paths:
                stack.enter_context(in_float32(modules[path]))
            yield

    many = len(paths)
    which, they = ("the one norm that overflows", "it returns")
    if many > 1:
        which, they = (f"the {many:,} norms that overflow", "they return")
    return Remedy(
        name=_NAME,
        summary=f"Computes in float32 {which} inside, and rounds what {they} to float16.",
        around=around,
        exportable=False,
    )


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """The module's own weights and what it is given in float32; what it returns in the weights' dtype, or that of what
    it was given.
    """
    own = {name: one.data for name, one in module.named_parameters(recurse=False)}
    dtypes: list[torch.dtype] = []

    def widen(module: nn.Module, args: tuple[Any, ...]) -> Any:
        dtypes.append(next((one.dtype for one in args if isinstance(one, Tensor)), torch.float32))
        return tree_map_only(Tensor, Tensor.float, args)

    def narrow(module: nn.Module, args: Any, output: Any) -> Any:
        dtype = next(iter(own.values())).dtype if own else dtypes[-1]
        dtypes.pop()
        return tree_map_only(Tensor, lambda one: one.to(dtype), output)

    handles = [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow)]
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, data in own.items():
            getattr(module, name).data = data
