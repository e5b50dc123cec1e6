"""Why a tensor is not finite: a mask at work, an earlier break passed on, or a break of its own.

A break is an output that is not finite although every floating operand was. The operator is then repeated on
the same operands in the next wider format, which tells a value too large to store from a sum that overflowed on
the way to a result that fits, and from an operation that has no finite result in any format.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stabilitykit.checkpoints.mapped import pieces
from stabilitykit.formats import NumberFormat
from stabilitykit.recorder.axes import Axes
from stabilitykit.recorder.operators import CONTRACTIONS, POLES, SELECTIONS, traits
from stabilitykit.recorder.origins import Hidden, Origin, hidden
from stabilitykit.records import Break, BreakKind, flat_index, index_at

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


@dataclass(slots=True)
class Operand:
    tensor: Tensor
    origin: Origin

    def hides(self) -> "Hidden | None":
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


@dataclass(slots=True)
class Finding:
    """A break, and the origins of its operands."""

    broke: Break
    origins: tuple[Origin | None, ...]


def blocks(operand: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Where an additive mask hides a key: -inf, or the very negative finite number that stands for it.

    transformers uses the dtype's minimum, gemma_pytorch -2.38e38; both are past half the minimum. `dtype` is that in
    which the mask was made, the operand's own unless given.
    """
    if operand.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
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


def judge(call: Call, output: Tensor, lost: Tensor, axes: Axes, stored: NumberFormat) -> Finding | None:
    """Looks closer at an `output` that holds a NaN or infinity which no operand that was computed had.

    `lost` is True at the elements that are neither finite nor masked, `axes` tells the axes of `output` apart, `stored`
    is the format that it is stored in. None where an operand that was computed had it after all.
    """
    culprit = next((operand for operand in call.operands if _carries_damage(operand)), None)
    if culprit is not None:
        kind = culprit.origin.kind
        if kind == "computed":
            return None
        found: BreakKind = "weight" if kind == "weight" else "input"
        return Finding(_break(found, lost, axes, (), None, stored), (culprit.origin,))

    flat = _earliest(lost, axes)
    index = index_at(flat, output.shape)
    value = _widened(call, index)
    kind_found = _kind(call, output, index, value, stored)
    operands, sites = _operands_at(call, output.shape, index)
    return Finding(_break(kind_found, lost, axes, operands, value, stored), sites)


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


def _carries_damage(operand: Operand) -> bool:
    if operand.origin.lost or operand.origin.kind == "computed":
        return operand.origin.lost
    tensor = operand.tensor
    if operand.origin.may_mask:
        return bool((tensor.isnan() | (tensor == math.inf)).any())
    return not all(bool(piece.isfinite().all()) for piece in pieces(tensor))  # a head's weight may fill the memory


def _earliest(lost: Tensor, axes: Axes) -> int:
    """Row-major index of the first lost element at the earliest position."""
    if axes.position is None:
        return int(lost.flatten().int().argmax())
    places = lost.reshape(axes.shape).nonzero()
    positions = places[:, axes.position]
    if axes.pairs:
        positions = positions.maximum(places[:, -1])
    first = places[int((positions == positions.min()).int().argmax())]
    return flat_index(first.tolist(), axes.shape)


def _break(
    kind: BreakKind,
    lost: Tensor,
    axes: Axes,
    operands: Sequence[float],
    value: float | None,
    stored: NumberFormat,
) -> Break:
    flat = _earliest(lost, axes)
    place = index_at(flat, axes.shape)
    return Break(
        kind=kind,
        count=int(lost.sum()),
        row=None if axes.row is None else place[axes.row],
        position=axes.position_of(place),
        channel=place[-1] if place else None,
        token=None,
        index=index_at(flat, lost.shape),
        operands=tuple(operands),
        operand_sites=(),
        value=value,
        limit=stored.largest,
    )


def _kind(call: Call, output: Tensor, index: tuple[int, ...], value: float | None, stored: NumberFormat) -> BreakKind:
    if call.name in ("softmax", "log_softmax") and call.operands:
        dim = call.args[1] if len(call.args) > 1 else -1
        row = call.operands[0].tensor.movedim(dim, -1)
        place = list(index)
        del place[dim]
        if bool((row[tuple(place)] == -math.inf).all()):
            return "masked-row"
    if value is None:
        return "unresolved"
    if math.isnan(value):
        return "invalid"
    if math.isinf(value):
        return "division-by-zero" if call.name in POLES else "overflow"
    if stored.overflows(value):
        return "overflow"
    return "reduction"


def _widened(call: Call, index: tuple[int, ...]) -> float | None:
    """The element at `index` of the same operator on the same operands in the next wider format."""
    if call.func is None or traits(call.func).seeded:  # drawing again would change the user's
        return None

    def widen(argument: Any) -> Any:
        if isinstance(argument, Tensor) and argument.is_floating_point():
            return argument.to(_WIDER.get(argument.dtype, torch.float64), copy=True)
        if isinstance(argument, torch.dtype) and argument in _WIDER:
            return _WIDER[argument]
        return argument

    args = tree_map(widen, call.args)
    if call.name in ("softmax", "log_softmax") and len(args) > 2:
        args = (*args[:2], False)  # half_to_float holds for half operands only
    try:
        wide = call.func(*args, **tree_map(widen, call.kwargs))
    except (RuntimeError, TypeError, IndexError):  # not every kernel exists in every dtype
        return None
    result = wide[0] if isinstance(wide, tuple | list) else wide
    return float((torch.view_as_real(result) if result.is_complex() else result)[index])


def _operands_at(
    call: Call, shape: torch.Size, index: tuple[int, ...]
) -> tuple[tuple[float, ...], tuple[Origin | None, ...]]:
    """What the element at `index` was made of; Python scalars have no origin, complex numbers no magnitude here."""
    if call.func is None or any(operand.tensor.is_complex() for operand in call.operands):
        return (), ()
    if traits(call.func).pointwise:
        values: list[float] = []
        origins: list[Origin | None] = []
        rest = list(call.operands)
        for argument in call.args:
            if rest and argument is rest[0].tensor:
                operand = rest.pop(0)
                values.append(float(operand.tensor.expand(shape)[index]))
                origins.append(operand.origin)
            elif isinstance(argument, int | float) and not isinstance(argument, bool):
                values.append(float(argument))
                origins.append(None)
        return tuple(values), tuple(origins)
    parts = [operand.tensor for operand in call.operands]
    if call.name in CONTRACTIONS and len(parts) >= 2 and len(index) >= 2:
        left, right = parts[-2], parts[-1]
        batch = index[:-2]
        parts[-2], parts[-1] = left[batch][index[-2]], right[batch][:, index[-1]]
    return tuple(float(part.abs().max()) for part in parts), tuple(operand.origin for operand in call.operands)
