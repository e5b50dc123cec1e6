"""Why a tensor is not finite: an earlier break passed on, or a break of its own.

A break is an output that is not finite although every floating operand was. The operator is then repeated on
the same operands in the next wider format, which tells a value too large to store from a sum that overflowed on
the way to a result that fits, and from an operation that has no finite result in any format.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stabilitykit.checkpoints.mapped import pieces
from stabilitykit.formats import NumberFormat
from stabilitykit.models.operators import CONTRACTIONS, POLES, traits
from stabilitykit.recorder.kernels.axes import NOWHERE, Axes
from stabilitykit.recorder.masks import Call, Operand
from stabilitykit.recorder.origins import Origin
from stabilitykit.records import Break, BreakKind, flat_index, index_at

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


@dataclass(slots=True)
class Finding:
    """A break, and the origins of its operands."""

    broke: Break
    origins: tuple[Origin | None, ...]


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


def _carries_damage(operand: Operand) -> bool:
    if operand.origin.lost or operand.origin.kind == "computed":
        return operand.origin.lost
    tensor = operand.tensor
    if operand.origin.may_mask:
        return bool((tensor.isnan() | (tensor == math.inf)).any())
    return not all(bool(piece.isfinite().all()) for piece in pieces(tensor))  # a head's weight may fill the memory


def _earliest(lost: Tensor, axes: Axes) -> int:
    """Row-major index of the first lost element at the earliest position."""
    if not axes.positioned:
        return int(lost.flatten().int().argmax())
    places = lost.reshape(axes.shape).nonzero()
    positions = axes.positions_of(places)
    assert positions is not None
    positions = positions.where(positions != NOWHERE, torch.iinfo(positions.dtype).max)
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
    """Positions are still those of `axes`, and tokens not looked up."""
    flat = _earliest(lost, axes)
    place = index_at(flat, axes.shape)
    places = lost.reshape(axes.shape).nonzero()
    rows, positions = axes.rows_of(places), axes.positions_of(places)
    return Break(
        kind=kind,
        count=int(lost.sum()),
        row=axes.row_of(place),
        position=axes.position_of(place),
        channel=place[-1] if place else None,
        token=None,
        index=index_at(flat, lost.shape),
        operands=tuple(operands),
        operand_sites=(),
        value=value,
        limit=stored.largest,
        rows=_those(rows, -1),
        positions=_those(positions, NOWHERE),
    )


def _those(found: Tensor | None, missing: int) -> tuple[int, ...]:
    return () if found is None else tuple(n for n in sorted(set(found.tolist())) if n != missing)


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
