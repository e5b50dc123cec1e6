"""A format with the precision of 16 bits and the range of float32: what rounding alone does to a run."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from truth.by_hand import Change
from truth.by_hand.dtypes import FLOAT8, NARROW, Instead, converted
from truth.row import Planted


def rounded(bits: int, way: Callable[[Tensor], Tensor]) -> Change:
    """Rounds what every operator makes to `bits` significant bits by `way`: torch.round, torch.floor or torch.ceil.

    What is cast to a format of 8 bits has that one's.
    """

    def change(planted: Planted, stack: ExitStack) -> Any:
        model = converted(planted, torch.float32, stack)
        for one in (*planted.model.parameters(), *planted.model.buffers()):
            if one.is_floating_point() and bits < 11:
                one.data = to_bits(one.data, bits, torch.round)
        stack.enter_context(Instead(torch.float32, NARROW, made))
        return model

    def made(func: Any, output: Any, asked: torch.dtype | None) -> Any:
        if any(one.alias_info is not None for one in func._schema.returns):  # a view, or written in place
            return output
        own = FLOAT8.get(asked, bits) if asked is not None else bits
        return tree_map_only(Tensor, lambda x: to_bits(x, own, way) if x.dtype == torch.float32 else x, output)

    return change


def to_bits(x: Tensor, bits: int, way: Callable[[Tensor], Tensor]) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.where(x.isfinite(), torch.ldexp(way(mantissa * 2.0**bits) / 2.0**bits, exponent), x)
