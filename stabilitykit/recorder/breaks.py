"""Why a tensor is not finite: an earlier break passed on, or a break of its own.

The element that broke first is looked at, with the values that it was made of. If one of those is not finite, the
damage came with it, and its origin says from where: an earlier record, a weight, an input, a constant. If all are
finite the operator made it, and what the same operands give in float64 tells a value too large to store from a sum that
overflowed on the way to a result that fits, and from an operation that has no finite result.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stabilitykit.formats import NumberFormat
from stabilitykit.models.operators import traits
from stabilitykit.recorder.contributions import Contribution, contributions, in_float64, placed
from stabilitykit.recorder.kernels.axes import NOWHERE, Axes
from stabilitykit.recorder.masks import Call
from stabilitykit.recorder.origins import Origin
from stabilitykit.recorder.rounding import Rounded, unrounded
from stabilitykit.records import Break, BreakKind, OriginKind, flat_index, index_at

_KINDS: dict[OriginKind, BreakKind] = {
    "weight": "weight",
    "buffer": "weight",
    "input": "input",
    "cache": "input",
    "outside": "input",
    "constant": "constant",
}

# Where float64 itself gives infinity out of finite operands these grew past its end; elsewhere it is a pole.
_GROW = frozenset("exp exp2 expm1 sinh cosh prod cumprod logsumexp mul matmul add sub sum addcmul square".split())


@dataclass(slots=True)
class Finding:
    """A break, the origins of its operands, the one it came from, and which operand rounding had spoilt."""

    broke: Break
    origins: tuple[Origin | None, ...] = ()
    origin: Origin | None = None
    rounded: Rounded | None = None
    of_mask: bool = False  # an operand held the -inf of a mask


@dataclass(frozen=True, slots=True)
class Passed:
    """No break: `origin`, an operand's, had the damage already."""

    origin: Origin


class OfMask:
    """No break: an infinity that came of a mask's -inf, which operators that are not told of masks hand on."""


def judge(
    call: Call,
    output: Tensor,
    lost: Tensor,
    axes: Axes,
    stored: NumberFormat,
    *,
    origin_of: Callable[[Tensor], Origin],
    is_still: Callable[[Tensor, Origin], bool],
) -> Finding | Passed | OfMask:
    """Looks closer at an `output` that holds a NaN or infinity.

    `lost` is True at the elements that are neither finite nor masked, `axes` tells the axes of `output` apart, `stored`
    is the format that it is stored in. `origin_of` tells where a tensor's values come from, `is_still` whether they are
    still those.
    """
    if call.func is None:
        return _of_module(call, lost, axes, stored, origin_of)
    index = index_at(_earliest(lost, axes), output.shape)
    parts = contributions(call, output.shape, index)
    masked = call.name in ("softmax", "log_softmax") and bool(parts) and bool((parts[0].values == -math.inf).all())
    if not masked:
        culprit = _culprit(parts, lost, axes, stored)
        if culprit is not None:
            return culprit
        number = placed(call.args, call.kwargs)
        if number is not None and not math.isnan(number) and any(part.operand is not None for part in parts):
            number = number if bool(output[index].abs() == abs(number)) else None
        if number is not None:
            origin = Origin("constant", f"{number:g}", lost=True)
            return Finding(break_at("constant", lost, axes, stored), (origin,), origin)
    value = in_float64(call, output.shape, index)
    kind: BreakKind = "masked-row" if masked else kind_of(call.name, value, stored, grows=_is_large_power(call))
    past = next((p for p in parts if p.operand is None and stored.overflows(p.largest)), None)
    if past is not None and value is not None and math.isfinite(value) and not stored.overflows(value):
        origin = Origin("constant", f"{past.largest:g}", lost=True)  # a number that this dtype does not hold
        return Finding(break_at("constant", lost, axes, stored), (origin,), origin)
    of_mask = not masked and any(part.operand is not None and not part.is_finite() for part in parts)
    if of_mask and value is not None and math.isinf(value) and traits(call.func).pointwise:
        return OfMask()
    operands = tuple(part.largest for part in parts if part.values.numel())
    if masked:  # each of a query's keys is hidden, whose positions do not matter
        axes = axes.of_queries()
    broke = replace(break_at(kind, lost, axes, stored), operands=operands, value=value)
    origins = tuple(None if part.operand is None else part.operand.origin for part in parts if part.values.numel())
    found = Finding(broke, origins, _largest(parts))
    if masked:
        mask = None if parts[0].operand is None else parts[0].operand.origin.mask
        found.rounded = None if mask is None else mask.overflow()
        emptied = None if mask is None else mask.empties()
        if emptied is not None:
            found.broke = replace(found.broke, outside=emptied.code)
    elif kind in ("invalid", "division-by-zero"):
        found.of_mask = of_mask
        found.rounded = unrounded(call, output.shape, index, is_still)
    return found


def _culprit(parts: Sequence[Contribution], lost: Tensor, axes: Axes, stored: NumberFormat) -> Finding | Passed | None:
    """What brought the damage along, if anything did."""
    for part in parts:
        if part.operand is None or part.is_finite():
            continue
        origin = part.operand.origin
        if origin.trail is not None or (origin.kind == "computed" and origin.lost):
            return Passed(origin)
        source = origin.source
        if source is None:
            worse = part.values.isnan() if origin.of_mask else part.values.isnan() | (part.values == math.inf)
            if (origin.of_mask or origin.masked is not None) and not bool(worse.any()):
                continue  # the -inf of a mask, which this operator does not take for one
            return Finding(break_at("unresolved", lost, axes, stored), (origin,), None)
        if source.kind == "constant" and part.operand.tensor.ndim == 0:
            source = Origin("constant", f"{float(part.values.reshape(-1)[0]):g}")
        source.lost = True
        return Finding(break_at(_KINDS[source.kind], lost, axes, stored), (source,), source)
    return None


def _of_module(
    call: Call, lost: Tensor, axes: Axes, stored: NumberFormat, origin_of: Callable[[Tensor], Origin]
) -> Finding | Passed:
    """What can be told where no operators were seen: only what was plainly not finite before."""
    unseen = False
    for operand in call.operands:
        if Contribution(operand, operand.tensor).is_finite():
            continue
        origin = operand.origin
        if origin.trail is not None or (origin.kind == "computed" and origin.lost):
            return Passed(origin)
        source = origin.source
        if source is None or (source.looked_at and not source.lost):  # what is not finite was written to it since
            unseen = True
        elif source.kind != "constant" and not bool((operand.tensor == -math.inf).any()):
            source.lost = True
            return Finding(break_at(_KINDS[source.kind], lost, axes, stored), (source,), source)
    if not unseen and call.module is not None:
        for tensor in _own_tensors(call.module):
            origin = origin_of(tensor)
            if tensor.is_floating_point() and not Contribution(None, tensor).is_finite():
                if origin.kind != "weight" and bool((tensor == -math.inf).any()):
                    continue  # a buffer that is a mask
                origin.lost = True
                return Finding(break_at("weight", lost, axes, stored), (origin,), origin)
    return Finding(break_at("unresolved", lost, axes, stored))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _largest(parts: Sequence[Contribution]) -> Origin | None:
    held = [part for part in parts if part.values.numel()]
    if not held:
        return None
    part = max(held, key=lambda part: abs(part.largest))
    if part.operand is None:
        return Origin("constant", f"{part.largest:g}")
    return part.operand.origin


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


def break_at(kind: BreakKind, lost: Tensor, axes: Axes, stored: NumberFormat, outside: str | None = None) -> Break:
    """A break of which nothing more is known than where elements are `lost`. Positions are still those of `axes`, and
    tokens not looked up.
    """
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
        operands=(),
        operand_sites=(),
        value=None,
        limit=stored.largest,
        outside=outside,
        rows=_those(rows, -1),
        positions=_those(positions, NOWHERE),
    )


def _those(found: Tensor | None, missing: int) -> tuple[int, ...]:
    return () if found is None else tuple(n for n in sorted(set(found.tolist())) if n != missing)


def kind_of(operator: str, value: float | None, stored: NumberFormat, *, grows: bool = False) -> BreakKind:
    """How an operator made what is not finite of finite operands, which give `value` in float64; None: not known."""
    if value is None:
        return "unresolved"
    if math.isnan(value):
        return "invalid"
    if math.isinf(value):
        return "overflow" if grows or operator in _GROW else "division-by-zero"
    return "overflow" if stored.overflows(value) else "reduction"


def _is_large_power(call: Call) -> bool:
    """pow has a pole where zero is raised to a negative power, and grows elsewhere."""
    exponent = call.args[1] if call.name == "pow" and len(call.args) > 1 else None
    return isinstance(exponent, int | float) and exponent > 0
