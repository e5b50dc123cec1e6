"""Records made by hand: a run of 3 tokens and 4 channels, and what may break in it."""

from dataclasses import replace
from typing import Any

from stabilitykit.records import Break, BreakKind, FormatCounts, Header, Record
from stabilitykit.records.layers import layer_of

HEADER = Header(
    checkpoint="toy",
    sha256="0" * 64,
    dtype="float16",
    device="cpu",
    level="operators",
    matmul="native",
    formats=("float16",),
    rows=1,
    tokens=((2, 7, 9),),
    token_texts={2: "<bos>", 7: " a", 9: "."},
)


def made(order: int, site: str, **changes: Any) -> Record:
    """A healthy record of 3 tokens and 4 channels, with changes."""
    module = site.partition("/")[0]
    found = layer_of(module)
    healthy = Record(
        order=order, step=0, site=site, label=None, module=module, operator="add",
        layer=None if found is None else found[1], dtype="float16", shape=(1, 3, 4), elements=12, masked=0, nan=0,
        positive_inf=0, negative_inf=0, zero=0, subnormal=0, amax=8.0, smallest=0.5, minimum=-8.0, maximum=1.0,
        mean=0.0, rms=1.0, exponent_first=-1, exponents=(11, 0, 0, 0, 1), formats={"float16": FormatCounts(0, 0, 0)},
        amax_row=0, amax_position=1, amax_channel=2, amax_token=7, amax_token_text=" a", positions=3, channels=4,
    )  # fmt: skip
    return replace(healthy, **changes)


def broke(kind: BreakKind = "overflow", position: int = 0, **changes: Any) -> Break:
    """An overflow of a sum, at one of the three tokens; nothing later took part in it."""
    healthy = Break(
        kind=kind, count=1, row=0, position=position, channel=2, token=(2, 7, 9)[position],
        index=(0, position, 2), operands=(60000.0, 8000.0),
        operand_sites=("layers.0/add.0", "layers.0.mlp.down_proj"), value=68000.0, limit=65504.0, causal=True,
    )  # fmt: skip
    return replace(healthy, **changes)


def lost_everything(order: int, site: str, **changes: Any) -> Record:
    return made(order, site, nan=12, amax=None, lost_positions=3, lost_channels=4, **changes)
