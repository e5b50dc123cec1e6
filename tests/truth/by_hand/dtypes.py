"""Everything in another dtype: weights, what the model is given, and what its code casts to a narrow one itself."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from truth.by_hand import Change
from truth.row import Planted

LOW = (torch.float16, torch.bfloat16)
FLOAT8 = {torch.float8_e5m2: 3, torch.float8_e4m3fn: 4}  # and its significant bits
NARROW = (*LOW, *FLOAT8)


def low(planted: Planted) -> torch.dtype | None:
    """The 16-bit dtype of the weights; of what has none, float16; None where they are float32 or float64."""
    dtypes = {one.dtype for one in planted.model.parameters()} | {one.dtype for one in planted.model.buffers()}
    dtypes = {one for one in dtypes if one.is_floating_point}
    return next((one for one in LOW if one in dtypes), None if dtypes else torch.float16)


def writes(func: Any) -> bool:
    return any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)


class Instead(TorchDispatchMode):
    """Works in `target` wherever code asks for a dtype of `narrow`, or has a tensor of one.

    `made` is given what an operator made, and the narrow dtype that was asked for.
    """

    def __init__(
        self,
        target: torch.dtype,
        narrow: tuple[torch.dtype, ...],
        made: Callable[[Any, Any, torch.dtype | None], Any] = lambda func, output, asked: output,
    ) -> None:
        super().__init__()
        self.target, self.narrow, self.made = target, narrow, made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if writes(func):
            into = next((one.dtype for one in args if isinstance(one, Tensor)), None)
            first, *rest = args or (None,)
            return func(first, *tree_map(lambda x: _fitting(x, into), rest), **kwargs)
        asked: list[torch.dtype] = []

        def change(x: Any) -> Any:
            if isinstance(x, torch.dtype) and x in self.narrow:
                asked.append(x)
                return self.target
            return x.to(self.target) if isinstance(x, Tensor) and x.dtype in self.narrow else x

        args, kwargs = tree_map(change, (args, kwargs))
        return self.made(func, func(*args, **kwargs), asked[0] if asked else None)


def _fitting(x: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point() or dtype is None or not dtype.is_floating_point:
        return x
    return x.to(dtype)


def in_dtype(dtype: torch.dtype, narrow: tuple[torch.dtype, ...] | None = None) -> Change:
    """Autocasting casts to it, or not at all. `narrow`: what code asks for and does not get; that of the weights."""

    def change(planted: Planted, stack: ExitStack) -> Any:
        own = low(planted) or torch.float16
        model = converted(planted, dtype, stack)
        if not planted.grad:  # a mode sees the operators of both directions
            stack.enter_context(Instead(dtype, (own,) if narrow is None else narrow))
        return model

    return change


def converted(planted: Planted, dtype: torch.dtype, stack: ExitStack) -> Any:
    """The model and what it is given."""
    model = planted.model.to(dtype)

    def cast(module: Any, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, (args, kwargs))

    stack.callback(model.register_forward_pre_hook(cast, with_kwargs=True).remove)
    autocast: Any = torch.autocast
    torch.autocast = lambda kind, *_, **__: nullcontext() if dtype == torch.float32 else autocast(kind, dtype)  # type: ignore[assignment, misc]
    stack.callback(setattr, torch, "autocast", autocast)
    return model
