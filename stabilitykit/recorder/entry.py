"""A record in the making: what is known when a tensor is made, and the record once everything is."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

from torch import Tensor

from stabilitykit.recorder.blocks import Part
from stabilitykit.recorder.breaks import Finding
from stabilitykit.recorder.deviation import DeviationTally
from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.kernels.layout import Edges, Field
from stabilitykit.recorder.labels import Family, label
from stabilitykit.recorder.origins import Mask, Origin, Role
from stabilitykit.recorder.places.streams import Step, Stream
from stabilitykit.recorder.repro.keep import Kept
from stabilitykit.recorder.rounding import Rounded
from stabilitykit.recorder.softmax import SoftmaxTally
from stabilitykit.recorder.statistics import Row, Statistics, decode, joined
from stabilitykit.records import BACKWARD, WEIGHT_GRADIENT, Break, Header, Record, flat_index, index_at
from stabilitykit.records.layers import layer_of

_SHARED = [spec.name for spec in fields(Statistics) if spec.name != "amax_index"]


@dataclass(frozen=True, slots=True)
class Form:
    """What tensors of one dtype and shape share: what both are called, which axis is which, what is counted."""

    dtype: str
    shape: tuple[int, ...]
    axes: Axes
    edges: Edges


@dataclass(slots=True)
class Doubt:
    """What `mask` hides, counted in `row` in case it turns out to be no mask, and what broke there if so."""

    mask: Mask
    row: Row
    broke: "Entry | None" = None
    lost: Tensor | None = None


@dataclass(slots=True)
class Entry:
    """`site` is final only when every module around it has returned, and a token's text when the pass is over.

    `region` is the memory it was measured in; `row` becomes `measured` when somebody asks. A tensor made by blocks has
    what was found in those so far. `broke_on` are the origins of the break's operands, `came_from` is
    the one it came from, `rounded` an operand that rounding had spoilt. `doubt`: whether what a mask hides is hidden
    shows later. `of_mask`: a mask's -inf made the break. `of_weight`: a parameter's gradient. `repeats` is the number
    of an entry which this one is again, if it has the same statistics. `operands` are those of what broke here, or
    absorbed what had, if they are kept. `order` is that of its record, once there is one.
    """

    step: Step
    module: str
    site: str
    operator: str | None
    region: tuple[int, int, int]
    form: Form
    row: Row | None = None
    measured: Statistics | None = None
    elements: int | None = None  # as many as the blocks have; None: as many as the form
    position_amax: Tensor | None = None  # by row and position
    lost_positions: Tensor | None = None
    lost_channels: Tensor | None = None  # by channel
    softmax: SoftmaxTally | None = None
    deviation: DeviationTally | None = None
    extra: dict[str, float | None] = field(default_factory=dict)
    broke: Break | None = None
    broke_on: tuple[Origin | None, ...] = ()
    came_from: Origin | None = None
    rounded: Rounded | None = None
    of_mask: bool = False
    of_weight: bool = False
    absorbs: bool = False
    role: Role | None = None
    doubt: Doubt | None = None
    repeats: int | None = None
    operands: Kept | None = None
    order: int | None = None

    def take(self, row: Row, part: Part | None) -> None:
        """What was counted of the tensor, or of one more part of it."""
        if part is not None:
            self.elements = (self.elements or 0) + math.prod(part.shape)
        self.row = joined(self.row, row, part)

    def take_peaks(self, peaks: Tensor, part: Part | None) -> None:
        """The amax of each row and position of the tensor, or of one more part of it."""
        if part is None:
            self.position_amax = peaks
            return
        if self.position_amax is None:
            self.position_amax = peaks.new_zeros((*peaks.shape[:-1], part.whole[-2]))
        start = part.offsets[0]
        self.position_amax[..., start : start + peaks.shape[-1]] = peaks

    def take_lost(self, lost: Tensor, axes: Axes, part: Part | None) -> None:
        """Where it is lost, a boolean for each element of the tensor or of one more part of it."""
        found = axes.lost_of(lost)
        if found is not None:
            self.lost_positions = found if self.lost_positions is None else self.lost_positions + found
        folded = lost.reshape(axes.shape)
        channels = folded.reshape(-1, folded.shape[-1] if folded.ndim else 1).any(0)
        if part is not None:
            of_part, channels = channels, channels.new_zeros(part.whole[-1])
            channels[part.offsets[1] : part.offsets[1] + len(of_part)] = of_part
        self.lost_channels = channels if self.lost_channels is None else self.lost_channels | channels

    def take_break(self, finding: Finding, axes: Axes, part: Part | None) -> None:
        """Why elements were lost, of the tensor or of one more part of it; an earlier part's break comes first."""
        broke, stream = finding.broke, self._stream(axes)
        rows, positions = broke.rows, tuple(self.absolute(at, axes) for at in broke.positions)
        known = tuple(at for at in positions if at is not None)
        if self.broke is not None:
            self.broke = replace(
                self.broke,
                count=self.broke.count + broke.count,
                rows=tuple(sorted({*self.broke.rows, *rows})),
                positions=tuple(sorted({*self.broke.positions, *known})),
            )
            return
        if part is not None:
            index = index_at(part.index(flat_index(broke.index, part.shape)), part.whole)
            broke = replace(broke, index=index, channel=index[-1])
        position = self.absolute(broke.position, axes)
        self.broke = replace(
            broke,
            position=position,
            token=None if stream is None else stream.token_at(broke.row, broke.position),
            positions=known,
            counts="token" if stream is None else stream.counts,
            causal=self._causal(axes, broke.row, broke.position),
        )
        self.broke_on, self.came_from, self.rounded = finding.origins, finding.origin, finding.rounded
        self.of_mask = finding.of_mask

    def decide(self) -> None:
        """The pass is over: what a mask hid that has turned out to be none counts like everything else."""
        doubt, self.doubt = self.doubt, None
        if doubt is None or doubt.mask.confirmed or self.row is None:
            return
        self.row, self.measured = joined(self.row, doubt.row, None), None
        self.row[Field.MASKED] = 0
        if doubt.lost is not None:
            self.take_lost(doubt.lost, self.form.axes, None)
        if doubt.broke is not None and self.broke is None:
            self.broke, self.broke_on = doubt.broke.broke, doubt.broke.broke_on
            self.came_from, self.rounded = doubt.broke.came_from, doubt.broke.rounded
            self.operands = doubt.broke.operands

    def _stream(self, axes: Axes) -> Stream | None:
        return self.step.streams[axes.slot] if axes.positioned and axes.slot < len(self.step.streams) else None

    def _causal(self, axes: Axes, row: int | None, position: int | None) -> bool:
        """Whether, as checked, nothing later than this position of its own sequence took part."""
        of = axes.labels
        stream = self._stream(axes)
        if of is None or position is None or stream is None or stream.adrift:
            return False
        bounds = dict(of.bounds)
        if bounds.pop(axes.slot, position) > position or bounds:  # something later, or of another sequence
            return False
        for number, check in enumerate(self.step.checks):
            if of.checks >> number & 1:
                holds = check.tolist()
                if not (all(holds) if row is None or len(holds) == 1 or row >= len(holds) else holds[row]):
                    return False
        return True

    @property
    def statistics(self) -> Statistics:
        if self.measured is None:
            assert self.row is not None
            self.measured = decode(self.row, self.form.edges, self.form.shape, self.elements)
        return self.measured

    @property
    def positions(self) -> int | None:
        return self.form.axes.positions

    def locate(self, index: tuple[int, ...]) -> tuple[int | None, int | None, int | None]:
        """Row, absolute position and channel of an element of the tensor."""
        axes = self.form.axes
        place = index_at(flat_index(index, self.form.shape), axes.shape)
        return axes.row_of(place), self.absolute(axes.position_of(place), axes), place[-1] if place else None

    def absolute(self, position: int | None, axes: Axes) -> int | None:
        """From where positions of these axes begin to where their sequence does."""
        stream = self._stream(axes)
        return None if position is None or stream is None or stream.adrift else position + stream.start

    def token(self, row: int | None, position: int | None, axes: Axes) -> int | None:
        stream = self._stream(axes)
        return None if position is None or stream is None else stream.token(row, position)

    def _label(self, family: Family | None) -> str | None:
        if self.module == BACKWARD:
            return WEIGHT_GRADIENT if self.of_weight else None
        return label(self.site, family, self.role)

    def record(
        self,
        order: int,
        header: Header | None = None,
        *,
        family: Family | None = None,
        shows_tokens: bool = False,
        site_of: Callable[[Origin], str] = lambda origin: origin.name,
    ) -> Record:
        """The record, when everything is known."""
        self.order, layer = order, layer_of(self.module)
        broke = self.broke
        if broke is not None:
            sites = tuple("constant" if origin is None else site_of(origin) for origin in self.broke_on)
            source, rounded = self.came_from, self.rounded
            broke = replace(
                broke,
                operand_sites=sites,
                token=broke.token if shows_tokens else None,
                origin_kind=None if source is None else source.kind,
                origin_name=None if source is None else site_of(source),
                origin_finite=None if source is None else not source.lost,
                rounded_site=None if rounded is None else site_of(rounded.origin),
                rounded_from=None if rounded is None else rounded.value,
            )
        statistics, shape = self.statistics, self.form.shape
        row = position = channel = token = None
        if statistics.amax_index is not None:
            row, position, channel = self.locate(statistics.amax_index)
            token = self.token(row, position, self.form.axes) if shows_tokens else None
        return Record(
            order=order,
            step=self.step.number,
            site=self.site,
            label=self._label(family),
            module=self.module,
            operator=self.operator,
            layer=layer[1] if layer else None,
            dtype=self.form.dtype,
            shape=shape,
            stored_dtype=self.form.dtype if header is not None and header.dtype == "float16" else None,
            **{name: getattr(statistics, name) for name in _SHARED},
            amax_row=row,
            amax_position=position,
            amax_channel=channel,
            amax_token=token,
            amax_token_text=None if header is None else header.text_of(token),
            position_amax=None if self.position_amax is None else tuple(self.position_amax.flatten().tolist()),
            positions=self.positions,
            channels=self.form.axes.shape[-1] if shape else None,
            lost_positions=0 if self.lost_positions is None else int(self.lost_positions),
            lost_channels=0 if self.lost_channels is None else int(self.lost_channels.sum()),
            absorbs=self.absorbs,
            softmax=None if self.softmax is None else self.softmax.result(),
            deviation=None if self.deviation is None else self.deviation.result(),
            broke=broke,
            extra=self.extra,
        )
