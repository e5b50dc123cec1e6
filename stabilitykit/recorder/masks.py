"""Masks: which elements of a tensor they hide.

A mask is something that was not computed and holds -inf, or the very negative finite number that stands for it, and
that is added to scores or selected, on the way to a softmax or a maximum. What it hides is neither a large value nor an
overflow, so it enters no other statistic.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.models.operators import CONTRACTIONS, SELECTIONS, traits
from stabilitykit.recorder.kernels.layout import FLOATS
from stabilitykit.recorder.origins import Hidden, Mask, Origin, hidden
from stabilitykit.recorder.tensors import is_here

# What becomes of hidden elements shows that a mask hid them: they lose against every other, or vanish.
_LOSES = frozenset(
    "softmax log_softmax logsumexp logcumsumexp exp sigmoid max amax argmax aminmax maximum cummax topk sort argsort "
    "multinomial max_pool2d_with_indices max_pool3d_with_indices scaled_dot_product_attention".split()
)


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
        if tensor.ndim < 1 or self.origin.clear:
            return None
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if self.origin.hidden is None:
            self.origin.hidden = {}
        if key not in self.origin.hidden:  # nothing is written there without becoming another origin
            self.origin.hidden[key] = hidden(blocks(tensor), tensor.stride())
        return self.origin.hidden[key]

    def holds_infinity(self) -> bool:
        """Whether there is -inf in what was not computed: whoever writes that means a mask. Looked at once."""
        origin = self.origin
        if not origin.may_mask:
            return False
        if origin.holds_infinity is None:
            here = is_here(self.tensor) and not self.tensor.is_meta and not self.tensor.is_complex()
            origin.holds_infinity = here and bool((self.tensor == -math.inf).any())
        return origin.holds_infinity


@dataclass(slots=True)
class Call:
    """An operator, or `module` where `func` is None, with the operands as they were before it ran."""

    name: str
    operands: list[Operand]
    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None


def calls_of_each(call: Call, results: int) -> list[Call]:
    """One call for each result: an operator on lists of tensors is as many operators on tensors."""
    if not call.name.startswith("_foreach_") or (results < 2 and not call.args):
        return [call] * results
    packet = getattr(torch.ops.aten, call.name.removeprefix("_foreach_"), None)
    calls = []
    for i in range(results):
        args = tuple(argument[i] if isinstance(argument, list | tuple) else argument for argument in call.args)
        held = {id(argument) for argument in args}
        second = args[1] if len(args) > 1 else None
        overload = "default" if second is None else "Tensor" if isinstance(second, Tensor) else "Scalar"
        func = getattr(packet, overload, None)
        operands = [operand for operand in call.operands if id(operand.tensor) in held]
        calls.append(Call(call.name.removeprefix("_foreach_"), operands, func or call.func, args))
    return calls


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


def may_hide(call: Call, output: Tensor) -> tuple[Hidden, float, Mask] | None:
    """Which elements of `output` a mask would hide, the largest that counts as hidden, and the mask; None for none.

    It hides where it is added, where a selection puts such a number, and in what pointwise operators make of hidden
    elements as long as that stays very negative.
    """
    if call.func is None:
        return None
    if call.name in SELECTIONS:
        parts = _placed(call, output)
    elif traits(call.func).pointwise or call.name == "log_softmax":
        keeps = call.name in ("add", "cast", "minimum", "fmin")
        parts = [o.hides() for o in call.operands if keeps or o.origin.masked is not None]
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
    return union, limit, _mask_of(call)


def _mask_of(call: Call) -> Mask:
    origins = [operand.origin for operand in call.operands]
    known = list({id(origin.mask): origin.mask for origin in origins if origin.mask is not None}.values())
    certain = any(origin.scores for origin in origins) or (call.name in SELECTIONS and _selects_infinity(call))
    certain = certain or any(operand.holds_infinity() for operand in call.operands)
    added = next((origin.overflowed for origin in origins if origin.overflowed is not None), None)
    if len(known) == 1 and (known[0].confirmed or not certain) and added is None:
        return known[0]
    return Mask(certain or any(mask.confirmed for mask in known), tuple(known), added)


def _selects_infinity(call: Call) -> bool:
    """Whether a selection puts -inf somewhere: whoever writes that means a mask."""
    numbers = [number for number in (*call.args, *call.kwargs.values()) if isinstance(number, float)]
    scalars = [operand.tensor for operand in call.operands if operand.tensor.ndim == 0 and is_here(operand.tensor)]
    return -math.inf in numbers or any(bool(scalar == -math.inf) for scalar in scalars if not scalar.is_meta)


def show_masks(name: str, operands: Sequence[Operand]) -> None:
    """An operator reads these operands: whether what may be masks in them are."""
    if name in _LOSES:
        for operand in operands:
            mask = operand.origin.mask
            if mask is not None and not mask.confirmed:
                mask.confirm()


def are_scores(call: Call, output: Tensor) -> bool:
    """Whether `output` is a product of two computed tensors, or made of one without mixing its elements."""
    if call.name in CONTRACTIONS:
        return len(call.operands) == 2 and all(
            operand.origin.kind == "computed" and not operand.origin.scores for operand in call.operands
        )
    if call.func is None or not (traits(call.func).pointwise or call.name in ("softmax", *SELECTIONS)):
        return False
    return any(o.origin.scores and o.tensor.numel() == output.numel() for o in call.operands)


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
