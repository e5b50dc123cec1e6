"""A record in the making: what is known when a tensor is made, and the record once everything is."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from stabilitykit.recorder.axes import Axes
from stabilitykit.recorder.kernels.layout import Edges
from stabilitykit.recorder.labels import Family, label
from stabilitykit.recorder.origins import Origin
from stabilitykit.recorder.statistics import Row, Statistics, decode
from stabilitykit.records import Break, Deviation, Header, Record, Softmax, flat_index, index_at

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?=\.|$)")
_SHARED = [spec.name for spec in fields(Statistics) if spec.name != "amax_index"]


@dataclass(slots=True, kw_only=True)
class Entry:
    """`site` is final only when every module around it has returned, and a token's text when the pass is over.

    `region` is the memory it was measured in; `row`, counted against `edges`, becomes `measured` when somebody asks.
    `start` is the position of the step's first token, `length` the number of them, `tokens` what the sequences hold.
    `broke_on` are the origins of the break's operands.
    """

    step: int
    module: str
    site: str
    operator: str | None
    region: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    axes: Axes
    start: int
    length: int
    tokens: Sequence[Sequence[int]]
    edges: Edges | None = None
    row: Row | None = None
    measured: Statistics | None = None
    position_amax: Tensor | None = None  # by row and position
    lost_positions: int = 0
    lost_channels: int = 0
    softmax: Softmax | None = None
    deviation: Deviation | None = None
    broke: Break | None = None
    broke_on: tuple[Origin | None, ...] = ()

    @property
    def statistics(self) -> Statistics:
        if self.measured is None:
            assert self.row is not None
            assert self.edges is not None
            self.measured = decode(self.row, self.edges, self.shape)
        return self.measured

    @property
    def positions(self) -> int | None:
        rows = 1 if self.axes.row is None else self.axes.shape[self.axes.row]
        if self.axes.position is not None:
            return rows * self.axes.shape[self.axes.position]
        return rows if self.axes.at_last else None

    def locate(self, index: tuple[int, ...]) -> tuple[int | None, int | None, int | None]:
        """Row, absolute position and channel of an element of the tensor."""
        place = index_at(flat_index(index, self.shape), self.axes.shape)
        row = None if self.axes.row is None else place[self.axes.row]
        return row, self.absolute(self.axes.position_of(place)), place[-1] if place else None

    def absolute(self, position: int | None) -> int | None:
        if position is None and self.axes.at_last:
            position = (self.length or 1) - 1
        return None if position is None else position + self.start

    def token(self, row: int | None, position: int | None) -> int | None:
        ids = self.tokens[row or 0] if (row or 0) < len(self.tokens) else ()
        return ids[position] if position is not None and position < len(ids) else None

    def record(self, order: int, header: Header, *, family: Family | None, site_of: Callable[[Origin], str]) -> Record:
        layer = _LAYER.search(self.module)
        broke = self.broke
        if broke is not None:
            sites = tuple("constant" if origin is None else site_of(origin) for origin in self.broke_on)
            broke = replace(broke, operand_sites=sites, token=None if header.tokens is None else broke.token)
        statistics = self.statistics
        row = position = channel = token = None
        if statistics.amax_index is not None:
            row, position, channel = self.locate(statistics.amax_index)
            token = None if header.tokens is None else self.token(row, position)
        return Record(
            order=order,
            step=self.step,
            site=self.site,
            label=label(self.site, family),
            module=self.module,
            operator=self.operator,
            layer=int(layer[1]) if layer else None,
            dtype=self.dtype,
            shape=self.shape,
            **{name: getattr(statistics, name) for name in _SHARED},
            amax_row=row,
            amax_position=position,
            amax_channel=channel,
            amax_token=token,
            amax_token_text=header.text_of(token),
            position_amax=None if self.position_amax is None else tuple(self.position_amax.flatten().tolist()),
            positions=self.positions,
            channels=self.shape[-1] if self.shape else None,
            lost_positions=self.lost_positions,
            lost_channels=self.lost_channels,
            softmax=self.softmax,
            deviation=self.deviation,
            broke=broke,
        )
