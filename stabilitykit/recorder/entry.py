"""A record in the making: what is known when a tensor is made, and the record once everything is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from torch import Tensor

from stabilitykit.recorder.blocks import Part
from stabilitykit.recorder.breaks import Finding
from stabilitykit.recorder.deviation import DeviationTally
from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.kernels.layout import Edges, Field
from stabilitykit.recorder.labels import Family, label
from stabilitykit.recorder.origins import Mask, Origin, Role
from stabilitykit.recorder.rounding import Rounded
from stabilitykit.recorder.softmax import SoftmaxTally
from stabilitykit.recorder.statistics import Row, Statistics, decode, joined
from stabilitykit.records import Break, Header, Record, flat_index, index_at
from stabilitykit.records.layers import layer_of

_SHARED = [spec.name for spec in fields(Statistics) if spec.name != "amax_index"]


@dataclass(slots=True)
class Step:
    """A forward pass: `rows` sequences get `length` new tokens, the first of them at the position `start`.

    `tokens` are those of each sequence, with what its cache holds. `rows` and `length` are None where they are not
    known.
    """

    number: int = 0
    start: int = 0
    rows: int | None = None
    length: int | None = None
    tokens: Sequence[Sequence[int]] = ()


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
    shows later. `repeats` is the number of an
    entry which this one is again, if it has the same statistics.
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
    absorbs: bool = False
    role: Role | None = None
    doubt: Doubt | None = None
    repeats: int | None = None

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
        folded = lost.reshape(axes.shape)
        kept = {d for d in (axes.row, axes.position) if d is not None}
        if axes.position is not None or axes.at_last:
            others = [dim for dim in range(folded.ndim) if dim not in kept]
            found = (folded.any(dim=others) if others else folded).sum()
            self.lost_positions = found if self.lost_positions is None else self.lost_positions + found
        channels = folded.reshape(-1, folded.shape[-1] if folded.ndim else 1).any(0)
        if part is not None:
            of_part, channels = channels, channels.new_zeros(part.whole[-1])
            channels[part.offsets[1] : part.offsets[1] + len(of_part)] = of_part
        self.lost_channels = channels if self.lost_channels is None else self.lost_channels | channels

    def take_break(self, finding: Finding, part: Part | None) -> None:
        """Why elements were lost, of the tensor or of one more part of it; an earlier part's break comes first."""
        broke = finding.broke
        if self.broke is not None:
            self.broke = replace(self.broke, count=self.broke.count + broke.count)
            return
        if part is not None:
            index = index_at(part.index(flat_index(broke.index, part.shape)), part.whole)
            broke = replace(broke, index=index, channel=index[-1])
        position = self.absolute(broke.position)
        self.broke = replace(broke, position=position, token=self.token(broke.row, position))
        self.broke_on, self.came_from, self.rounded = finding.origins, finding.origin, finding.rounded

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

    @property
    def statistics(self) -> Statistics:
        if self.measured is None:
            assert self.row is not None
            self.measured = decode(self.row, self.form.edges, self.form.shape, self.elements)
        return self.measured

    @property
    def positions(self) -> int | None:
        axes = self.form.axes
        rows = 1 if axes.row is None else axes.shape[axes.row]
        if axes.position is not None:
            return rows * axes.shape[axes.position]
        return rows if axes.at_last else None

    def locate(self, index: tuple[int, ...]) -> tuple[int | None, int | None, int | None]:
        """Row, absolute position and channel of an element of the tensor."""
        axes = self.form.axes
        place = index_at(flat_index(index, self.form.shape), axes.shape)
        row = None if axes.row is None else place[axes.row]
        return row, self.absolute(axes.position_of(place)), place[-1] if place else None

    def absolute(self, position: int | None) -> int | None:
        if position is None and self.form.axes.at_last:
            position = (self.step.length or 1) - 1
        return None if position is None else position + self.step.start

    def token(self, row: int | None, position: int | None) -> int | None:
        tokens = self.step.tokens
        ids = tokens[row or 0] if (row or 0) < len(tokens) else ()
        return ids[position] if position is not None and position < len(ids) else None

    def record(
        self,
        order: int,
        header: Header | None = None,
        *,
        family: Family | None = None,
        site_of: Callable[[Origin], str] = lambda origin: origin.name,
    ) -> Record:
        """The record, when everything is known. Without a header there are no tokens in it."""
        layer = layer_of(self.module)
        broke = self.broke
        shows_tokens = header is not None and header.tokens is not None
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
            token = self.token(row, position) if shows_tokens else None
        return Record(
            order=order,
            step=self.step.number,
            site=self.site,
            label=label(self.site, family, self.role),
            module=self.module,
            operator=self.operator,
            layer=layer[1] if layer else None,
            dtype=self.form.dtype,
            shape=shape,
            **{name: getattr(statistics, name) for name in _SHARED},
            amax_row=row,
            amax_position=position,
            amax_channel=channel,
            amax_token=token,
            amax_token_text=None if header is None else header.text_of(token),
            position_amax=None if self.position_amax is None else tuple(self.position_amax.flatten().tolist()),
            positions=self.positions,
            channels=shape[-1] if shape else None,
            lost_positions=0 if self.lost_positions is None else int(self.lost_positions),
            lost_channels=0 if self.lost_channels is None else int(self.lost_channels.sum()),
            absorbs=self.absorbs,
            softmax=None if self.softmax is None else self.softmax.result(),
            deviation=None if self.deviation is None else self.deviation.result(),
            broke=broke,
            extra=self.extra,
        )
