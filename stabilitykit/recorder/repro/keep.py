"""The operands of what broke, and of what absorbed it, copied while they are at hand."""

from dataclasses import dataclass

import torch

from stabilitykit.recorder.masks import Call
from stabilitykit.recorder.repro.axes import at_element
from stabilitykit.recorder.repro.operation import Operation, obstacle

MOST = 64 * 2**20
"""Bytes of operands that one recording keeps."""

_EACH = MOST // 4  # past them, of an operator of which that is known, only what makes the element that broke

Kept = Operation | str
"""An operator with copies of its operands; or why there are none, in words that follow "cannot be run alone: "."""


@dataclass(slots=True)
class Keeper:
    """Keeps operands in the order in which it is given them, for as long as there is room, in the host's memory."""

    room: int = MOST

    def keep(self, call: Call, index: tuple[int, ...], shape: torch.Size) -> Kept:
        """What `call` was given, whose result of this shape is looked at in one element. Never raises."""
        try:
            why = obstacle(call)
            return why if why is not None else self._copy(Operation.of(call, index, shape))
        except Exception as error:  # nothing of ours may end the pass
            return f"copying its operands failed ({type(error).__name__})"

    def _copy(self, whole: Operation) -> Kept:
        chosen: Operation | None = whole
        if whole.nbytes > min(_EACH, self.room):
            chosen = at_element(whole) or (whole if whole.nbytes <= self.room else None)
        if chosen is None or chosen.nbytes > self.room:
            left = "" if self.room == MOST else f", of which {self.room / 2**20:.1f} are left"
            size = whole.nbytes / 2**20
            return f"its operands take {size:,.1f} MiB, and of a recording {MOST // 2**20} MiB are kept{left}"
        self.room -= chosen.nbytes
        return chosen.copied()


def first_not_finite(call: Call, shape: torch.Size) -> tuple[int, ...]:
    """Where in a result of this shape an operand is not finite; its first element where shapes do not tell."""
    for operand in call.operands:
        lost = ~operand.tensor.isfinite()
        sizes = zip(reversed(lost.shape), reversed(shape), strict=False)
        if bool(lost.any()) and lost.ndim <= len(shape) and all(size in (1, whole) for size, whole in sizes):
            return tuple(lost.expand(shape).nonzero()[0].tolist())
    return (0,) * len(shape)
