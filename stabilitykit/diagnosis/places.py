"""Where something is, in words: the site, the layer, the head, and which tokens of which rows."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from stabilitykit.diagnosis.parts import broken_channel
from stabilitykit.records import Break, Record, Recording
from stabilitykit.records.layers import layer_of
from stabilitykit.words import counted, listed, ordinal

if TYPE_CHECKING:
    from stabilitykit.diagnosis.chain import Link

_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)(?=\.|$)")


def where(record: "Record | Link") -> str:
    """`layer 7, residual after MLP (layers.7, operator add)`"""
    layer = "" if record.layer is None else f"layer {record.layer}, "
    operator = f", operator {record.operator}" if record.operator else ""
    named = record.label or record.site or ""
    return f"{layer}{named} ({record.site}{operator})" if named != record.site else f"{layer}{named}{operator}"


def place_of(recording: Recording, position: int | None, row: int | None, token: int | None, step: int) -> str:
    """`, at token 0 '<bos>'`; empty where the position is not known."""
    if position is None:
        return ""
    named = recording.header.named(token)
    thing = "position" if token is None and recording.header.tokens is not None else "token"  # a frame, a patch
    text = f", at {thing} {position}" + (f" {named}" if named else "")
    if recording.header.rows > 1 and row is not None:
        text += f" of row {row}"
    return text + _generated(recording, position, step)


def places_of(recording: Recording, broke: Break, step: int) -> str:
    """Where a break is, with all its positions and rows: `, at tokens 0 to 3 of row 1`.

    Of several positions that are not neighbours the first is named, and the others are counted. Empty where no
    position is known.
    """
    position = broke.position
    if position is None:
        return ""
    thing, header = broke.counts, recording.header
    positions = broke.positions or (position,)
    named = header.named(broke.token)
    if len(positions) == 1:
        text = f"{thing} {position}" + (f" {named}" if named else "")
    elif positions == tuple(range(positions[0], positions[-1] + 1)):
        text = f"{thing}s {positions[0]} to {positions[-1]}"
    else:
        text = f"{thing} {position}" + (f" {named}" if named else "") + f" and {len(positions) - 1:,} more"
    return f", at {text}{_rows(recording, broke)}{_generated(recording, position, step)}"


def channel_of(recording: Recording, record: Record) -> str:
    """`, channel 443`; `, first in channel 443` where several have lost elements. Empty where it is no channel's."""
    channel = broken_channel(recording, record)
    if channel is None:
        return ""
    return f", channel {channel:,}" if max(record.lost_channels, 1) == 1 else f", first in channel {channel:,}"


def _rows(recording: Recording, broke: Break) -> str:
    if recording.header.rows < 2 or broke.row is None:
        return ""
    rows = broke.rows or (broke.row,)
    if len(rows) == 1:
        return f" of row {rows[0]}"
    if len(rows) == recording.header.rows:
        return f", in all {len(rows):,} rows"
    return f", in rows {listed([str(row) for row in rows], most=4)}"


def _generated(recording: Recording, position: int, step: int) -> str:
    if step > 0 and 0 < position == recording.header.first_position(step):  # not a pass from the beginning
        return f", the {ordinal(step)} token generated"
    return ""


def head_of(recording: Recording, record: Record) -> str:
    """`, head 1`, of scores and probabilities [B, H, L, L] or [B · H, L, L]; empty for tensors of other shapes."""
    broke, shape = record.broke, record.shape
    if broke is None or len(broke.index) != len(shape) or len(shape) not in (3, 4):
        return ""
    if len(shape) == 4:
        return f", head {broke.index[1]}" if shape[1] > 1 else ""
    heads = shape[0] // max(recording.header.rows, 1)
    return f", head {broke.index[0] % heads}" if heads > 1 else ""


def expert_of(record: Record) -> str:
    """`, expert 3`, where the module's path says so."""
    found = _EXPERT.search(record.module)
    return f", expert {found[1]}" if found else ""


def stack_names(records: Iterable[Record]) -> dict[str, str]:
    """What each stack of layers is called where a model has several, by its path; an empty name for a single one."""
    stacks: Sequence[str] = list(dict.fromkeys(found[0] for r in records if (found := layer_of(r.module)) is not None))
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    parts = [[part for part in stack.split(".")[:-1] if part != "model"] for stack in stacks]
    first = [part[0] if part else stack for part, stack in zip(parts, stacks, strict=True)]
    return dict(zip(stacks, first if len(set(first)) == len(first) else stacks, strict=True))


def more(records: Sequence[str]) -> str:
    """`a` · `a and 3 more`"""
    return records[0] if len(records) == 1 else f"{records[0]} and {counted(len(records) - 1, 'other')}"
