"""One tensor, as it is measured, and what is seen of it."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from stabilitykit.formats import FLOAT32, FORMATS
from stabilitykit.recorder.blocks import Part
from stabilitykit.recorder.breaks import OfMask, Passed, judge
from stabilitykit.recorder.entry import Entry, Form
from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.kernels.layout import Field, edges
from stabilitykit.recorder.masks import Call
from stabilitykit.recorder.origins import Origin, Origins
from stabilitykit.recorder.pending import Row
from stabilitykit.recorder.repro.keep import Keeper, first_not_finite
from stabilitykit.recorder.statistics import tally, tally_by_position
from stabilitykit.recorder.tensors import NAMES, aside

_NAN, _PLUS, _MINUS = int(Field.NAN), int(Field.PLUS), int(Field.MINUS)


@dataclass(slots=True)
class Observation:
    """One tensor, as it is measured.

    `entry` is its record in the making, of which it may be one part; `call` made it. `values` are its elements in a
    dtype that has order and bits, `hidden` where a mask hides them, `axes` which dimension is which. Operators that
    read it ask `origin`. `lost` is where it is not finite, once that is known. `outside` is the code that ran, if that
    was outside the model.
    """

    entry: Entry
    call: Call
    values: Tensor
    hidden: Tensor | None
    axes: Axes
    part: Part | None
    origin: Origin
    lost: Tensor | None = None
    outside: str | None = None

    def count(self, limit: float = math.inf, *, by_position: bool = False) -> Row | Tensor:
        """What a kernel counts of it. An element is hidden only if it is not above `limit`."""
        against = self.entry.form.edges
        if by_position and self.axes.position is not None and not self.values.is_meta:
            with aside():
                row, peaks = tally_by_position(self.values, against, self.axes, self.hidden, limit)
                self.entry.take_peaks(peaks, self.part)
            return row
        return tally(self.values, against, self.hidden, limit)

    def take(self, row: Row) -> bool:
        """Adds what was counted to the record; whether elements were lost that no operand is known to have lost."""
        self.entry.take(row, self.part)
        if not row[_NAN] + row[_PLUS] + row[_MINUS]:
            return False
        self.origin.lost = True
        with aside():
            self.lost = ~self.values.isfinite()
            if self.hidden is not None:
                self.lost &= ~self.hidden
            self.entry.take_lost(self.lost, self.axes, self.part)
        return not any(operand.origin.lost and operand.origin.kind == "computed" for operand in self.call.operands)

    def reads_damage(self) -> bool:
        """Whether an operand holds elements that a record has lost."""
        operands = self.call.operands if self.call.func is not None else ()
        return any(operand.origin.lost and operand.origin.kind == "computed" for operand in operands)

    def absorb(self, keeper: Keeper | None = None) -> bool:
        """The tensor is finite: notes whether an operand was not, in the elements that were read. No break."""
        with aside():
            for operand in self.call.operands:
                if operand.origin.lost and operand.origin.kind == "computed":
                    finite = operand.tensor.isfinite()
                    masked = operand.hides()
                    self.entry.absorbs |= not bool((finite if masked is None else finite | masked.where).all())
            if keeper is not None and self.entry.absorbs and self.entry.operands is None:
                shape = self.values.shape
                self.entry.operands = keeper.keep(self.call, first_not_finite(self.call, shape), shape)
        return False

    def judge(self, origins: Origins, keeper: Keeper | None = None) -> Origin | None:
        """Why elements were lost here, for the record. Returns the origin of an operand that had the damage.

        A `keeper` copies the operands of what broke.
        """
        assert self.lost is not None
        with aside():
            stored = FORMATS.get(self.entry.form.dtype, FLOAT32)
            found = judge(
                self.call, self.values, self.lost, self.axes, stored, origin_of=origins.of, is_still=origins.is_still
            )
        if isinstance(found, OfMask):
            self.origin.lost, self.origin.of_mask = False, True
            masks = (operand.origin.mask for operand in self.call.operands)
            self.origin.mask = next((mask for mask in masks if mask is not None), None)
            return self.origin
        if isinstance(found, Passed):
            return found.origin
        found.broke = replace(found.broke, outside=found.broke.outside or self.outside)
        if keeper is not None and self.entry.broke is None:  # of parts the first one that broke
            with aside():
                self.entry.operands = keeper.keep(self.call, found.broke.index, self.values.shape)
        self.entry.take_break(found, self.axes, self.part)
        return None


def form_of(tensor: Tensor, values: Tensor, shape: tuple[int, ...], axes: Axes, formats: tuple[str, ...]) -> Form:
    """The form of tensors like this one, of which `values` are measured, in a whole of this shape and axes."""
    name = NAMES[values.dtype if tensor.is_complex() else tensor.dtype]
    return Form(name, shape, axes, edges(values.dtype, formats))
