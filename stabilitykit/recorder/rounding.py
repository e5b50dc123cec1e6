"""Was a zero or an infinity made by rounding? The calls that made small tensors are kept for a while to find out.

0 / 0 has no finite result in any format; but where one of the zeros was 1e-8 before it was stored in float16, the same
model in float32 has one. The value is traced back through the calls that are still known, in float64.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.recorder.contributions import run_wide
from stabilitykit.recorder.masks import Call, Operand
from stabilitykit.recorder.origins import Origin

_CALLS = 64
_ELEMENTS = 1 << 16  # of a call's operands and result: norms' mean squares, gains, single tokens
_DEPTH = 12


@dataclass(frozen=True, slots=True)
class Made:
    """The call that made a tensor, and that tensor as it lay in memory."""

    call: Call
    output: Tensor


@dataclass(frozen=True, slots=True)
class Rounded:
    """`origin` was made with a value that float64 tells from what was stored: `value` instead of zero or infinity."""

    origin: Origin
    value: float


class Calls:
    """The last calls whose operands are small, with those operands."""

    def __init__(self) -> None:
        self._kept: deque[Origin] = deque()

    def keep(self, origin: Origin, call: Call, output: Tensor) -> None:
        size = output.numel()
        if size > _ELEMENTS:
            return
        for operand in call.operands:
            size += operand.tensor.numel()
        if size > _ELEMENTS:
            return
        origin.made = Made(call, output)
        self._kept.append(origin)
        if len(self._kept) > _CALLS:
            self._kept.popleft().made = None

    def forget(self) -> None:
        for origin in self._kept:
            origin.made = None
        self._kept.clear()


def unrounded(
    call: Call, shape: torch.Size, index: tuple[int, ...], is_still: Callable[[Tensor, Origin], bool]
) -> Rounded | None:
    """Which operand rounding spoilt, without which the element at `index` would be finite.

    None where nothing on the way is known to have been rounded to zero or infinity, or where the result is not finite
    all the same. `is_still` tells whether a tensor has been written to since.
    """
    if call.func is None or call.func.namespace != "aten":
        return None
    spoilt: list[Rounded] = []

    def wide(tensor: Tensor) -> Tensor:
        operand = next((o for o in call.operands if o.tensor is tensor), None)
        return tensor if operand is None else _wide(operand, spoilt, is_still, _DEPTH)

    try:
        result = run_wide(call, wide)
        value = float(result.expand(shape)[index])
    except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
        return None
    if not abs(value) < torch.inf:
        return None
    if not spoilt:  # neither zero nor infinite: rounded onto another number where the operator has no finite result
        for operand in call.operands:
            seen, tensor = wide(operand.tensor), operand.tensor
            if operand.origin.made is not None and seen.shape == tensor.shape == shape and seen[index] != tensor[index]:
                spoilt.append(Rounded(operand.origin, float(seen[index])))
    if not spoilt:
        return None
    return spoilt[-1]


def _wide(operand: Operand, spoilt: list[Rounded], is_still: Callable[[Tensor, Origin], bool], depth: int) -> Tensor:
    """An operand's values in float64, from the unrounded values of what it was made of where that is known."""
    tensor, made = operand.tensor, operand.origin.made
    if made is None or depth == 0 or not is_still(tensor, operand.origin):
        return tensor.double()
    call = made.call
    if call.func.namespace != "aten":
        return tensor.double()

    def wide(inner: Tensor) -> Tensor:
        found = next((o for o in call.operands if o.tensor is inner), None)
        return inner if found is None else _wide(found, spoilt, is_still, depth - 1)

    try:
        before = len(spoilt)
        lay = made.output
        result = torch.empty_strided(lay.shape, lay.stride(), dtype=torch.float64)
        result.copy_(run_wide(call, wide))
        seen = result.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - lay.storage_offset())
    except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
        return tensor.double()
    lost = ((tensor == 0) & (seen != 0) & seen.isfinite()) | (tensor.isinf() & seen.isfinite())
    if len(spoilt) == before and bool(lost.any()):
        spoilt.append(Rounded(operand.origin, float(seen[lost][0])))
    return seen
