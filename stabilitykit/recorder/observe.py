"""Observations: one tensor, measured the moment it exists, and the records being built from all of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from stabilitykit.formats import FLOAT32, FORMATS
from stabilitykit.models.operators import SELECTIONS
from stabilitykit.recorder.blocks import Part, part_of
from stabilitykit.recorder.breaks import judge
from stabilitykit.recorder.custom import CustomStatistics, Statistic
from stabilitykit.recorder.deviation import measure_deviation
from stabilitykit.recorder.entry import Entry, Form
from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.kernels.layout import FLOATS, Field, edges
from stabilitykit.recorder.masks import Call, may_hide
from stabilitykit.recorder.names import Frame
from stabilitykit.recorder.origins import Hidden, Origin, Origins, hidden
from stabilitykit.recorder.pending import Pending, Row
from stabilitykit.recorder.places.folded import axes_for
from stabilitykit.recorder.places.labels import Labels
from stabilitykit.recorder.places.track import Tracker
from stabilitykit.recorder.softmax import SoftmaxTally
from stabilitykit.recorder.statistics import tally, tally_by_position
from stabilitykit.recorder.tensors import NAMES, aside, is_here, measurable, region
from stabilitykit.records import Level

DEFAULT_FORMATS = tuple(
    form.name for form in sorted(FORMATS.values(), key=lambda form: -form.precision) if form.bits <= 16
)
"""The formats of at most 16 bits, the most precise first."""

_FORMS = 1 << 12  # that are remembered

_MASKED, _NAN, _PLUS, _MINUS = int(Field.MASKED), int(Field.NAN), int(Field.PLUS), int(Field.MINUS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `record` was asked for."""

    level: Level
    formats: tuple[str, ...]
    position_peaks: bool
    fused_softmax: bool
    stop_at_break: bool
    keep: dict[str, Tensor] | None
    against: Mapping[str, Tensor]
    watch: Sequence[tuple[str, int]]
    statistics: Sequence[Statistic]


@dataclass(slots=True)
class Observation:
    """One tensor, as it is measured.

    `entry` is its record in the making, of which it may be one part; `call` made it. `values` are its elements in a
    dtype that has order and bits, `hidden` where a mask hides them, `axes` which dimension is which. Operators that
    read it ask `origin`. `lost` is where it is not finite, once that is known.
    """

    entry: Entry
    call: Call
    values: Tensor
    hidden: Tensor | None
    axes: Axes
    part: Part | None
    origin: Origin
    lost: Tensor | None = None

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
        """Adds what was counted to the record; whether elements were lost here that no operand had lost."""
        self.entry.take(row, self.part)
        if not row[_NAN] + row[_PLUS] + row[_MINUS]:
            return False
        self.origin.lost = True
        with aside():
            self.lost = ~self.values.isfinite()
            if self.hidden is not None:
                self.lost &= ~self.hidden
            self.entry.take_lost(self.lost, self.axes, self.part)
        # else an infinity that was chosen, or one that an operand had
        return self.call.name not in SELECTIONS and not any(
            operand.origin.lost for operand in self.call.operands if operand.origin.kind == "computed"
        )

    def judge(self) -> bool:
        """Why elements were lost here, for the record; False where an operand had lost them after all."""
        assert self.lost is not None
        with aside():
            stored = FORMATS.get(self.entry.form.dtype, FLOAT32)
            finding = judge(self.call, self.values, self.lost, self.axes, stored)
        if finding is not None:
            self.entry.take_break(finding, self.axes, self.part)
        return finding is not None


@dataclass(slots=True, kw_only=True)
class Observer:
    """Measures every tensor it is shown. Nothing waits for a device: what was counted there arrives later.

    `origins` is told what is known of each tensor, `places` knows where its elements belong. `entries` are the records
    in the making, in order of execution, `forms` what tensors of the same labels share. `judgements` wait for a
    device that the pass must not wait for; `broken`: something broke. `watched` are the elements that were asked for.
    """

    options: Options
    origins: Origins
    places: Tracker
    pending: Pending
    custom: CustomStatistics
    entries: list[Entry] = field(default_factory=list)
    forms: dict[tuple[object, ...], Form] = field(default_factory=dict)
    judgements: list[Callable[[], bool]] = field(default_factory=list)
    broken: bool = False
    watched: list[tuple[str, int, Tensor]] = field(default_factory=list)

    def begin(self) -> None:
        """Before a step."""
        self.settle()
        if len(self.forms) > _FORMS:
            self.forms.clear()

    def observe(
        self,
        call: Call,
        tensor: Tensor,
        frame: Frame,
        site: str,
        *,
        hides: bool = False,
        repeats: int | None = None,
        labels: Labels | None = None,
    ) -> None:
        """Measures what `call` has made in the module of `frame`, or what that module returns.

        `hides`: a mask may hide elements of it. `repeats` is the number of an entry of the same memory. `labels` tell
        where its elements belong, if that is known already.
        """
        values = tensor
        if tensor.dtype not in FLOATS:
            with aside():
                values = measurable(tensor)
        masked: Hidden | None = None
        limit = math.inf
        if hides:
            with aside():
                found = may_hide(call, values)
            if found is not None:
                masked, limit = found
        entry, axes, part = self._entry(call, tensor, values, frame, site, repeats, labels)
        number = len(self.entries)
        if part is not None and frame.of_blocks is not None:
            number = frame.of_blocks.setdefault(site, number)
        if number == len(self.entries):
            self.entries.append(entry)
        origin = Origin("computed", site, number)
        seen = Observation(entry, call, values, None if masked is None else masked.where, axes, part, origin)
        row = seen.count(limit, by_position=self.options.position_peaks)
        if masked is not None and (masked.count is None or row[_MASKED] != masked.count):
            with aside():  # of the elements that a mask would hide those that are very negative
                narrowed = None
                if masked.count is None or row[_MASKED]:
                    narrowed = hidden(masked.where & (values <= limit), values.stride())
            masked, seen.hidden = narrowed, None if narrowed is None else narrowed.where
        if masked is not None:
            origin.masked = replace(masked, stride=tensor.stride())
        self.origins.remember(tensor, origin)
        if call.name == "softmax" and call.operands and values.numel() and values.ndim and not values.is_meta:
            self._add_softmax(seen)
        if self.custom:
            self.custom.take(entry, values, seen.hidden, part)
        self.compare(entry, values, part)

        if isinstance(row, Tensor):
            self.pending.after(row, lambda row: self._take(seen, row), [values, *(o.tensor for o in call.operands)])
        elif self.pending:
            self.pending.do(lambda: self._take(seen, row))
        elif part is not None or row[_NAN] or row[_PLUS] or row[_MINUS]:
            self._take(seen, row)
        else:
            entry.row = row

    def rename(self, entry: Entry, site: str, tensor: Tensor) -> None:
        keep = self.options.keep
        if keep is not None:
            keep.pop(entry.site, None)
        entry.site = site
        self.compare(entry, tensor)

    def compare(self, entry: Entry, tensor: Tensor, part: Part | None = None) -> None:
        """What depends on the site's name, and is done again when it changes."""
        site, keep, against, watch = entry.site, self.options.keep, self.options.against, self.options.watch
        if keep is None and not against and not watch:
            return
        with aside():
            if keep is not None and _is_compared(site):
                keep[site] = tensor.detach().clone()
            if site in against:
                stored = FORMATS.get(entry.form.dtype, FLOAT32)
                entry.deviation = measure_deviation(tensor, against[site], stored)
            for watched, index in watch:
                at = index if part is None else part.holds(index)
                if watched == site and at is not None and at < tensor.numel():
                    self.watched.append((site, index, tensor.reshape(-1)[at].clone()))

    def settle(self) -> None:
        """Waits for what is on its way, and looks closer at what broke."""
        self.pending.settle()
        judgements, self.judgements = self.judgements, []
        for judge_it in judgements:
            self.broken |= judge_it()

    def _entry(
        self,
        call: Call,
        tensor: Tensor,
        values: Tensor,
        frame: Frame,
        site: str,
        repeats: int | None,
        labels: Labels | None,
    ) -> tuple[Entry, Axes, Part | None]:
        """The entry of a tensor that may be a part of it; its own axes; which part."""
        step = self.places.step
        if labels is None or labels.shape != values.shape:
            labels = self.places.of(tensor if tensor.shape == values.shape else values)
        block = frame.block if call.func is not None else None
        if block is not None:
            shape = tuple(values.shape)
            queries, keys = block.stop - block.start, block.last_key - block.first_key
            part = part_of(shape, block, by_key=labels.pairs and shape[-2:] == (queries, keys))
            if part is not None:
                axes = axes_for(labels)
                number = None if frame.of_blocks is None else frame.of_blocks.get(site)
                if number is not None:
                    return self.entries[number], axes, part
                form = form_of(tensor, values, part.whole, part.whole_axes(axes), self.options.formats)
                return Entry(step, frame.path, site, call.name, region(tensor), form), axes, part
        key = (tensor.dtype, labels)
        known = self.forms.get(key)
        if known is None:
            axes = axes_for(labels)
            known = self.forms[key] = form_of(tensor, values, tuple(values.shape), axes, self.options.formats)
        operator = None if call.func is None else call.name
        return Entry(step, frame.path, site, operator, region(tensor), known, repeats=repeats), known.axes, None

    def _add_softmax(self, seen: Observation) -> None:
        with aside():
            logits, values = seen.call.operands[0], seen.values
            blocked = logits.hides()
            if seen.entry.softmax is None:
                seen.entry.softmax = SoftmaxTally()
            seen.entry.softmax.add(
                logits.tensor,
                values,
                int(seen.call.args[1]) % values.ndim,
                seen.axes.head if seen.axes.shape == tuple(values.shape) else None,
                None if blocked is None else blocked.where,
            )

    def _take(self, seen: Observation, row: Row) -> None:
        if seen.take(row):
            if is_here(seen.values):
                self.broken |= seen.judge()
            else:  # which waits for the device, and that the pass must not
                self.judgements.append(seen.judge)


def form_of(tensor: Tensor, values: Tensor, shape: tuple[int, ...], axes: Axes, formats: tuple[str, ...]) -> Form:
    """The form of tensors like this one, of which `values` are measured, in a whole of this shape and axes."""
    name = NAMES[values.dtype if tensor.is_complex() else tensor.dtype]
    return Form(name, shape, axes, edges(values.dtype, formats))


def _is_compared(site: str) -> bool:
    """Whether a run's copy of this tensor is worth its memory: modules' outputs, and sums directly in a layer."""
    module, slash, operator = site.partition("/")
    return not slash or (module.rpartition(".")[2].isdigit() and operator.startswith("add."))
