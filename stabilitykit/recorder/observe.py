"""The observer: every tensor is measured the moment it exists, and the records are built from all of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stabilitykit.formats import FLOAT32, FORMATS
from stabilitykit.models.operators import SELECTIONS
from stabilitykit.recorder.blocks import Part, part_of
from stabilitykit.recorder.breaks import Finding, break_at
from stabilitykit.recorder.contributions import contributions, in_float64, placed
from stabilitykit.recorder.copies import Copies
from stabilitykit.recorder.custom import CustomStatistics, Statistic
from stabilitykit.recorder.deviation import measure_deviation
from stabilitykit.recorder.entry import Doubt, Entry, Form
from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.kernels.layout import FLOATS, Field
from stabilitykit.recorder.masks import Call, Operand, are_scores, may_hide
from stabilitykit.recorder.names import CONSTANT, Frame
from stabilitykit.recorder.observation import Observation, form_of
from stabilitykit.recorder.origins import Emptied, Hidden, Mask, Origin, Origins, hidden
from stabilitykit.recorder.outside import code_outside
from stabilitykit.recorder.pending import Pending, Row
from stabilitykit.recorder.places.folded import axes_for
from stabilitykit.recorder.places.labels import Labels
from stabilitykit.recorder.places.track import Tracker
from stabilitykit.recorder.repro.keep import Keeper
from stabilitykit.recorder.roles import role_of
from stabilitykit.recorder.rounding import Calls, Rounded
from stabilitykit.recorder.softmax import SoftmaxTally
from stabilitykit.recorder.statistics import tally
from stabilitykit.recorder.tensors import aside, is_here, measurable, region
from stabilitykit.records import Level, flat_index, index_at

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
    backward: bool = False
    keep_operands: bool = False
    copies: Copies | None = None
    compared: Sequence[Copies] = ()


@dataclass(slots=True, kw_only=True)
class Observer:
    """Measures every tensor it is shown. Nothing waits for a device: what was counted there arrives later.

    `origins` is told what is known of each tensor, `places` knows where its elements belong. `entries` are the records
    in the making, in order of execution, `forms` what tensors of the same labels share. `judgements` wait for a device
    that the pass must not wait for; `broken`: something broke. `before` are entries that come before the one of that
    number: constants that turned out to be what broke it. `calls` made the last small tensors. `watched` are the
    elements that were asked for. `keeper` copies the operands of what breaks, if that was asked for.
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
    first: Entry | None = None  # that broke
    before: dict[int, list[Entry]] = field(default_factory=dict)
    calls: Calls = field(default_factory=Calls)
    watched: list[tuple[str, int, Tensor]] = field(default_factory=list)
    keeper: Keeper | None = None

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
        mask: Mask | None = None
        limit = math.inf
        if hides:
            with aside():
                found = may_hide(call, values)
            if found is not None:
                masked, limit, mask = found
        scores = are_scores(call, values)
        entry, axes, part = self._entry(call, tensor, values, frame, site, repeats, labels, scores=scores)
        number = len(self.entries)
        if part is not None and frame.of_blocks is not None:
            number = frame.of_blocks.setdefault(site, number)
        if number == len(self.entries):
            self.entries.append(entry)
        role = entry.role = role_of(call, frame.role, scores=scores, given=frame.given)
        origin = Origin("computed", site, number, scores=scores, role=role)
        seen = Observation(entry, call, values, None if masked is None else masked.where, axes, part, origin)
        row = seen.count(limit, by_position=self.options.position_peaks)
        if masked is not None and (masked.count is None or row[_MASKED] != masked.count):
            with aside():  # of the elements that a mask would hide those that are very negative
                narrowed = None
                if masked.count is None or row[_MASKED]:
                    narrowed = hidden(masked.where & (values <= limit), values.stride())
            masked, seen.hidden = narrowed, None if narrowed is None else narrowed.where
        if masked is not None and mask is not None:
            origin.masked, origin.mask = replace(masked, stride=tensor.stride()), mask
            self._doubt(seen, mask)
            if frame.module is None and seen.hidden is not None and seen.hidden.ndim and is_here(values):
                with aside():
                    if mask.empties() is None and bool(seen.hidden.all(-1).any()):
                        mask.emptied = Emptied(code_outside(), number)
        self.origins.remember(tensor, origin)
        if call.func is not None:
            self.calls.keep(origin, call, tensor)
        if frame.module is None:
            seen.outside = None if is_here(values) and not self._lost(row) else code_outside()
        if call.name == "softmax" and call.operands and values.numel() and values.ndim and not values.is_meta:
            self._add_softmax(seen)
        if self.custom:
            self.custom.take(entry, values, seen.hidden, part)
        self.compare(entry, values, part)
        if self.options.copies is not None:
            self.options.copies.take(entry, values, seen.hidden)
        self._follow(seen)
        if call.name == "cast" and tensor.dtype is torch.float8_e4m3fn:
            self._look_for_saturation(seen)
        if isinstance(row, Tensor):
            self.pending.after(row, lambda row: self._take(seen, row), [values, *(o.tensor for o in call.operands)])
        elif self.pending:
            self.pending.do(lambda: self._take(seen, row))
        elif part is not None or row[_NAN] or row[_PLUS] or row[_MINUS] or (self.broken and seen.reads_damage()):
            self._take(seen, row)
        else:
            entry.row = row

    def _look_for_saturation(self, seen: Observation) -> None:
        """torch's cast to float8_e4m3fn on a CPU makes the maximum of what is past it: finite, and another number."""
        given = seen.call.operands[-1].tensor if seen.call.operands else None
        if given is None or not is_here(given) or given.is_meta or given.shape != seen.values.shape or seen.part:
            return
        form = FORMATS["float8_e4m3fn"]
        with aside():
            past = given.isfinite() & (given.abs() > form.largest)
            if not bool(past.any()) or not form.overflows(float(given[past].abs().amax())):
                return
            broke = break_at("overflow", past, seen.axes, form)
            value = float(given[broke.index])
            found = Finding(replace(broke, operands=(value,), value=value), (seen.call.operands[-1].origin,))
            if self.keeper is not None:
                seen.entry.operands = self.keeper.keep(seen.call, broke.index, seen.values.shape)
        found.origin = seen.call.operands[-1].origin
        seen.entry.take_break(found, seen.axes, None)
        seen.entry.absorbs = self.broken = True

    @staticmethod
    def _lost(row: Row | Tensor) -> bool:
        return isinstance(row, Tensor) or bool(row[_NAN] + row[_PLUS] + row[_MINUS])

    def look_at_constant(self, call: Call, tensor: Tensor, origin: Origin, frame: Frame) -> None:
        """A result of constants alone. It has no record unless it is not finite and something computed comes of it."""
        if not is_here(tensor) or tensor.is_meta or not tensor.numel() or tensor.dtype not in FLOATS:
            return
        origin.trail = next((o.origin.trail for o in call.operands if o.origin.trail is not None), None)
        with aside():
            lowest, highest = (float(end) for end in tensor.aminmax())
        if math.isnan(lowest) or highest == math.inf or (lowest == -math.inf and self._is_new(call, tensor)):
            if lowest == -math.inf:
                self._note_overflow(call, tensor, origin)
            if origin.trail is None:
                site = frame.site(f"{CONSTANT}{call.name}")
                entry, axes, _ = self._entry(call, tensor, tensor, frame, site, None, None)
                seen = Observation(entry, call, tensor, None, axes, None, origin)
                row = seen.count()
                assert not isinstance(row, Tensor)
                if frame.module is None:
                    seen.outside = code_outside()
                seen.take(row)
                passed = seen.judge(self.origins, self.keeper)
                if passed is not None:
                    origin.trail = passed.trail
                elif frame.module is None and call.name == "softmax":  # of scores that a processor made anew
                    origin.trail = entry
                    self.before.setdefault(len(self.entries), []).append(entry)
                    self.broken = True
                elif entry.came_from is not None and entry.came_from.lost and not self._was_a_mask(call, entry):
                    origin.leaves = (entry.came_from,)  # handed on by arithmetic
                else:
                    origin.trail = entry
        if origin.trail is None:
            self.calls.keep(origin, call, tensor)

    @staticmethod
    def _is_new(call: Call, tensor: Tensor) -> bool:
        """Whether -inf came of finite numbers: of a mask it would be handed on, or selected."""
        finite = all(bool(operand.tensor.isfinite().all()) for operand in call.operands)
        return finite and call.name not in SELECTIONS and placed(call.args, call.kwargs) is None

    @staticmethod
    def _was_a_mask(call: Call, entry: Entry) -> bool:
        """Whether the operand that a break came from held nothing worse than -inf."""
        for operand in call.operands:
            if operand.origin is entry.came_from or operand.origin.source is entry.came_from:
                return not bool((operand.tensor.isnan() | (operand.tensor == math.inf)).any())
        return False

    def _note_overflow(self, call: Call, tensor: Tensor, of: Origin | Mask) -> None:
        """Where a mask was added, or made, by arithmetic that left the range: -inf out of finite numbers."""
        with aside():
            lost = tensor == -math.inf
            for operand in call.operands:
                lost = lost & operand.tensor.isfinite()
            if bool(lost.any()):
                index = index_at(int(lost.flatten().int().argmax()), tensor.shape)
                value = in_float64(call, tensor.shape, index)
                if value is not None and math.isfinite(value):
                    made = of if isinstance(of, Origin) else self.origins.of(tensor)
                    of.overflowed = Rounded(made, value)

    def leave_out(self, operands: Sequence[Operand]) -> None:
        """What came of a mask is left out on purpose, so it was no break: NaN by a sum, +inf that was put in by a
        minimum.
        """
        for operand in operands:
            entry = None if operand.origin.entry is None else self.entries[operand.origin.entry]
            if entry is not None and (entry.of_mask or _hides_from_least(entry)):
                entry.broke, operand.origin.lost = None, False
                self.first = None if self.first is entry else self.first

    def join(self, outputs: Sequence[Tensor]) -> None:
        """The results of one operator: damage has not ended in one of them that goes on in another."""
        origins = [self.origins.of(tensor) for tensor in outputs]
        if any(origin.lost for origin in origins):
            for origin in origins:
                if origin.entry is not None:
                    self.entries[origin.entry].absorbs = False

    def look_at_choice(self, operand: Operand) -> None:
        """The largest is taken of every row: where a row is hidden whole it is token 0, which nobody chose."""
        mask, tensor = operand.origin.mask, operand.tensor
        emptied = None if mask is None else mask.empties()
        if emptied is None or not is_here(tensor):
            return
        with aside():
            lost = (tensor == -math.inf).all(-1, keepdim=True).expand(tensor.shape)
            entry = self.entries[emptied.entry]
            if bool(lost.any()) and entry.broke is None and tuple(tensor.shape) == entry.form.shape:
                stored = FORMATS.get(entry.form.dtype, FLOAT32)
                axes = entry.form.axes
                entry.take_break(Finding(break_at("masked-row", lost, axes, stored, emptied.code)), axes, None)
                self.broken = True

    def _doubt(self, seen: Observation, mask: Mask) -> None:
        """A mask that has yet to be shown to be one: what it hides is counted too, in case that it is none."""
        assert seen.hidden is not None
        call, values = seen.call, seen.values
        if not mask.confirmed and seen.part is None and is_here(values) and not values.is_meta:
            with aside():
                row = tally(values, seen.entry.form.edges, ~seen.hidden)
                assert not isinstance(row, Tensor)
                doubt = Doubt(mask, row)
                lost = seen.hidden & ~values.isfinite()
                if bool(lost.any()) and not seen.reads_damage():
                    alone = replace(seen, hidden=None, lost=lost)
                    alone.entry = replace(seen.entry)
                    if alone.judge(self.origins, self.keeper) is None and alone.entry.broke is not None:
                        doubt.broke, doubt.lost = alone.entry, lost
            seen.entry.doubt = doubt
        if call.name == "add" and mask.overflowed is None and is_here(values) and not values.is_meta:
            added = [operand for operand in call.operands if operand.origin.may_mask]
            with aside():
                if not any(operand.holds_infinity() for operand in added) and float(values.amin()) == -math.inf:
                    self.origins.remember(values, seen.origin)
                    self._note_overflow(call, values, mask)

    def _follow(self, seen: Observation) -> None:
        """What the scale or weight that multiplies a value too large to store would have made of it."""
        first, call = self.first, seen.call
        if first is None or call.name not in ("mul", "div") or first.broke is None or first.broke.kind != "overflow":
            return
        for place, operand in enumerate(call.operands):
            if operand.origin.entry is not None and self.entries[operand.origin.entry] is first:
                self.first = None
                shape, value = operand.tensor.shape, first.broke.value
                same = shape.numel() == math.prod(first.form.shape) and operand.tensor.is_contiguous()
                if not same or seen.values.shape != shape or value is None or place > 0:
                    return
                index = index_at(flat_index(first.broke.index, first.form.shape), shape)
                with aside():
                    others = [p.largest for p in contributions(call, shape, index) if p.operand is not operand]
                if len(others) == 1 and math.isfinite(others[0]) and others[0]:
                    scaled = value * others[0] if call.name == "mul" else value / others[0]
                    first.broke = replace(first.broke, scaled=scaled)
                return

    def rename(self, entry: Entry, site: str, tensor: Tensor) -> None:
        keep = self.options.keep
        if keep is not None:
            keep.pop(entry.site, None)
        entry.site = site
        self.compare(entry, tensor)

    def compare(self, entry: Entry, tensor: Tensor, part: Part | None = None) -> None:
        """What depends on the site's name, and is done again when it changes."""
        site, keep, against, watch = entry.site, self.options.keep, self.options.against, self.options.watch
        for copies in self.options.compared:
            copies.compare(entry, tensor)
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
        *,
        scores: bool = False,
    ) -> tuple[Entry, Axes, Part | None]:
        """The entry of a tensor that may be a part of it; its own axes; which part."""
        step = self.places.step
        if labels is None or labels.shape != values.shape:
            labels = self.places.of(tensor if tensor.shape == values.shape else values)
        block = frame.block if call.func is not None else None
        if block is not None:
            shape = tuple(values.shape)
            queries, keys = block.stop - block.start, block.last_key - block.first_key
            part = part_of(shape, block, by_key=scores and shape[-2:] == (queries, keys))
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
        if not seen.take(row):
            if not seen.origin.lost and seen.reads_damage():
                if is_here(seen.values):
                    seen.absorb(self.keeper)
                else:
                    self.judgements.append(lambda: seen.absorb(self.keeper))
        elif is_here(seen.values):
            self.broken |= self._judge(seen)
        else:  # which waits for the device, and that the pass must not
            self.judgements.append(lambda: self._judge(seen))

    def _judge(self, seen: Observation) -> bool:
        """Whether something broke: here, or in a constant that this tensor was made of."""
        passed = seen.judge(self.origins, self.keeper)
        if passed is None:
            self.first = self.first or seen.entry
            return True
        trail = passed.trail
        if trail is None or any(trail in entries for entries in self.before.values()):
            return False
        number = seen.origin.entry
        self.before.setdefault(len(self.entries) if number is None else number, []).append(trail)
        return True


def _hides_from_least(entry: Entry) -> bool:
    """Whether +inf was put in, and nothing else is wrong."""
    broke, source = entry.broke, entry.came_from
    return broke is not None and broke.kind == "constant" and source is not None and source.name == "inf"


def _is_compared(site: str) -> bool:
    """Whether a run's copy of this tensor is worth its memory: modules' outputs, and sums directly in a layer."""
    module, slash, operator = site.partition("/")
    return not slash or (module.rpartition(".")[2].isdigit() and operator.startswith("add."))
