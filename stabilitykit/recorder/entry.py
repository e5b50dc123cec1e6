"""A record in the making: what is known when a tensor is made, and the record once everything is."""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import Tensor

from stabilitykit.recorder.labels import Family, label
from stabilitykit.recorder.origins import Origin
from stabilitykit.recorder.statistics import Statistics
from stabilitykit.records import Break, Deviation, Header, Record, Softmax

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?=\.|$)")
_SHARED = [spec.name for spec in fields(Statistics) if spec.name != "amax_index"]


@dataclass(slots=True, kw_only=True)
class Entry:
    """`site` is final only when every module around it has returned, and a token's text when the pass is over.

    `region` is the memory it was measured in; `broke_on` are the origins of the break's operands.
    """

    step: int
    module: str
    site: str
    operator: str | None
    region: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    statistics: Statistics
    row: int | None = None
    position: int | None = None
    channel: int | None = None
    token: int | None = None
    positions: int | None = None
    position_amax: Tensor | None = None  # by row and position
    lost_positions: int = 0
    lost_channels: int = 0
    softmax: Softmax | None = None
    deviation: Deviation | None = None
    broke: Break | None = None
    broke_on: tuple[Origin | None, ...] = ()

    def record(self, order: int, header: Header, *, family: Family | None, site_of: Callable[[Origin], str]) -> Record:
        layer = _LAYER.search(self.module)
        broke = self.broke
        if broke is not None:
            sites = tuple("constant" if origin is None else site_of(origin) for origin in self.broke_on)
            broke = replace(broke, operand_sites=sites, token=None if header.tokens is None else broke.token)
        token = None if header.tokens is None else self.token
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
            **{name: getattr(self.statistics, name) for name in _SHARED},
            amax_row=self.row,
            amax_position=self.position,
            amax_channel=self.channel,
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
