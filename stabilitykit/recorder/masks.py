"""Masks: which elements of a tensor they hide.

A mask is a constant or an input that holds -inf, or the very negative finite number that stands for it. What it hides
is neither a large value nor an overflow, so it enters no other statistic.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stabilitykit.models.operators import CONTRACTIONS, SELECTIONS, traits
from stabilitykit.recorder.kernels.layout import FLOATS
from stabilitykit.recorder.origins import Hidden, Origin, hidden


@dataclass(slots=True)
class Operand:
    tensor: Tensor
    origin: Origin

    def hides(self) -> Hidden | None:
        """Where this operand is a mask or was hidden by one."""
        masked = self.origin.masked
        tensor = self.tensor
        if self.origin.kind == "weight" or (masked is None and self.origin.kind == "computed") or tensor.is_complex():
            return None
        if masked is not None and masked.where.shape == tensor.shape and masked.stride == tensor.stride():
            return masked
        if masked is not None:  # a view of masked memory, in an order of its own, shows its mask by value
            return hidden(blocks(tensor), tensor.stride())
        if tensor.ndim < 2 or self.origin.clear:
            return None
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if self.origin.hidden is None:
            self.origin.hidden = {}
        if key not in self.origin.hidden:  # nothing is written there without becoming another origin
            # Attention masks come with four dimensions; what has fewer may be a hidden state, large and negative.
            is_mask = self.origin.kind == "constant" or tensor.ndim > 3
            where = blocks(tensor) if is_mask else tensor == -math.inf
            self.origin.hidden[key] = hidden(where, tensor.stride())
        return self.origin.hidden[key]


@dataclass(slots=True)
class Call:
    """An operator, or a module where `func` is None, with the operands as they were before it ran."""

    name: str
    operands: list[Operand]
    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def blocks(operand: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Where an additive mask hides a key: -inf, or the very negative finite number that stands for it.

    transformers uses the dtype's minimum, gemma_pytorch -2.38e38; both are past half the minimum. `dtype` is that in
    which the mask was made, the operand's own unless given.
    """
    if operand.dtype not in FLOATS:
        return torch.zeros_like(operand, dtype=torch.bool)  # complex numbers and float8 have no order on every device
    return operand <= torch.finfo(dtype or operand.dtype).min / 2


def narrowest(output: Tensor, operands: Iterable[Operand]) -> torch.dtype:
    """The dtype of the least range that is at work: float16's minimum is a mask even where float32 holds it."""
    dtypes = [tensor.dtype for tensor in (output, *(o.tensor for o in operands)) if tensor.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).min, default=output.dtype)


def may_hide(call: Call, output: Tensor) -> tuple[Hidden, float] | None:
    """Which elements of `output` a mask would hide, and the largest that counts as hidden; None for none.

    A mask is a constant or an input that holds very negative numbers. It hides where it is added, where a
    selection puts such a number, and in what pointwise operators make of hidden elements as long as that stays
    very negative.
    """
    if call.func is None:
        return None
    if call.name in SELECTIONS:
        parts = _placed(call, output)
    elif traits(call.func).pointwise or call.name == "log_softmax":
        parts = [operand.hides() for operand in call.operands]
    else:
        return None
    masks = [part for part in parts if part is not None]
    if not masks:
        return None
    limit = torch.finfo(narrowest(output, call.operands)).min / 2
    union: Hidden | None = masks[0].expand(output.shape)
    for part in masks[1:]:
        assert union is not None
        where = union.where | part.where.expand(output.shape)
        union = hidden(where, where.stride())
    assert union is not None
    return union, limit


def joins_positions(call: Call, output: Tensor) -> bool:
    """Whether the last two dimensions of `output`, whose sizes allow it, both count positions: attention scores.

    They begin as a product of two computed tensors, queries and keys, and stay what they are under pointwise
    operators and softmax. Probabilities times values is a product too, of something that is already of this kind.
    """
    if call.name in CONTRACTIONS:
        return len(call.operands) == 2 and all(
            operand.origin.kind == "computed" and not operand.origin.pairs for operand in call.operands
        )
    if call.func is None or not (traits(call.func).pointwise or call.name in ("softmax", *SELECTIONS)):
        return False
    return any(o.origin.pairs and o.tensor.numel() == output.numel() for o in call.operands)


def _placed(call: Call, output: Tensor) -> list[Hidden | None]:
    """What a selection puts in from a constant or an input, and what was hidden in the rest."""
    carried = [operand.hides() for operand in call.operands if operand.tensor.shape == output.shape]
    if call.name == "masked_fill":
        return [_whole(call.args[1]), *carried]
    if call.name == "where":
        condition, *sides = call.args
        origins = {id(operand.tensor): operand.origin for operand in call.operands}
        placed = [not isinstance(side, Tensor) or side.ndim == 0 or origins[id(side)].may_mask for side in sides]
        return [*([_whole(condition)] if placed[0] else []), *([_whole(~condition)] if placed[1] else []), *carried]
    return carried


def _whole(where: Tensor) -> Hidden | None:
    return hidden(where, where.stride())
