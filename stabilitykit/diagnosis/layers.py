"""A recording, layer by layer: how large, how close to the limit, how much lost, how sharp the attention."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from stabilitykit.diagnosis.places import stack_names
from stabilitykit.formats import number_format
from stabilitykit.records import Record, Recording
from stabilitykit.records.layers import layer_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer, or one part outside the layers, over all tensors it stored in the run's dtype.

    `amax` and where it is (`site`, `label`, `position`, `token`); `headroom` in bits of the run's dtype. `lost` and
    `subnormal` count elements, and `past` those that overflow the format asked for.
    Entropies of its softmax are in nats; None where there is no softmax. `extra` holds the largest of each statistic
    that a user added, over the same tensors; None where none of them has it.
    """

    name: str
    layer: int | None
    amax: float | None
    site: str | None
    label: str | None
    position: int | None
    token: str | None
    headroom: float | None
    lost: int
    subnormal: int
    past: int
    entropy_min: float | None
    entropy_mean: float | None
    extra: Mapping[str, float | None]


_PARTS = {
    "embed_tokens": "embed", "embedder": "embed", "norm": "norm", "lm_head": "logits", "sampler": "sampler",
    "outside": "sampler",
}  # fmt: skip
_WRAPPERS = ("language_model", "text_model", "model", "transformer", "encoder", "decoder")


def by_layer(recording: Recording, form: str = "float16") -> list[LayerRow]:
    """Rows in the order of the layers, over all steps. Tensors computed wider on purpose do not enter sizes.

    `form` names the format whose overflows are counted; where the run kept no counts for it, `past` is 0.
    """
    stacks = stack_names(record for record in recording if record.layer is not None)
    parts: dict[tuple[int, int, str], list[Record]] = {}
    for record in recording:
        part = _part(record, stacks)
        if part is not None:
            parts.setdefault(part, []).append(record)
    return [_row(recording, part[-1], parts[part], form) for part in sorted(parts, key=lambda part: part[:2])]


def stored(recording: Recording) -> Iterator[Record]:
    """The records of tensors that a run of the model in 16 bits stores in 16 bits, as `Record.is_stored_in` says."""
    return (record for record in recording if record.is_stored_in(recording.header.dtype))


def peak(records: Iterable[Record]) -> Record | None:
    """The record with the largest amax, the first of equals; None where nothing finite was stored."""
    return max((r for r in records if r.amax is not None), key=lambda r: r.amax or 0.0, default=None)


def _part(record: Record, stacks: Mapping[str, str]) -> tuple[int, int, str] | None:
    """The row of a record: the two numbers that it is ordered by, and its name; None for what stands in no table.

    Where a model has several stacks of layers, such as an encoder and a decoder, a row's name says of which it is.
    """
    if record.layer is not None:
        found = layer_of(record.module)
        stack = "" if found is None else found[0]
        order = list(stacks).index(stack) if stack in stacks else 0
        return order, record.layer, f"{stacks.get(stack, '')} {record.layer}".strip()
    path = record.module.split(".")
    while path[0] in _WRAPPERS and len(path) > 1:
        path.pop(0)
    name = _PARTS.get(path[0])
    if name is None:
        return None
    return (-1 if name == "embed" else len(stacks) + 1), 0, name


def _row(recording: Recording, part: str, records: list[Record], form: str) -> LayerRow:
    dtype = recording.header.dtype
    own = [record for record in records if record.is_stored_in(dtype)]
    top = peak(own)
    softmaxes = [record.softmax for record in records if record.softmax is not None]
    least = [e for s in softmaxes for e in s.entropy_min if not math.isnan(e)]
    mean = [e for s in softmaxes for e in s.entropy_mean if not math.isnan(e)]
    amax = None if top is None else top.amax
    return LayerRow(
        name=part,
        layer=records[0].layer,
        amax=amax,
        site=None if top is None else top.site,
        label=None if top is None else top.label,
        position=None if top is None else top.amax_position,
        token=None if top is None else top.amax_token_text,
        headroom=None if amax is None else number_format(dtype).headroom(amax),
        lost=sum(record.lost for record in own),
        subnormal=sum(record.subnormal or 0 for record in own),
        past=sum(record.formats[form].overflow for record in own if form in record.formats),
        entropy_min=min(least) if least else None,
        entropy_mean=sum(mean) / len(mean) if mean else None,
        extra={name: _largest(record.extra.get(name) for record in own) for name in recording.header.statistics},
    )


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None and not math.isnan(value)), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One step of a generation: the token it began with, and where its largest stored value was."""

    step: int
    token: str | None
    position: int | None
    amax: float | None
    headroom: float | None
    site: str | None
    label: str | None
    layer: int | None
    lost: int


def by_step(recording: Recording) -> list[StepRow]:
    """A row for each step; step 0 is the prompt, and each later one the token drawn in the one before."""
    header = recording.header
    own = sorted(stored(recording), key=lambda record: record.step)
    rows = []
    for step, group in groupby(own, key=lambda record: record.step):
        records = list(group)
        top = peak(records)
        amax = None if top is None else top.amax
        first = header.first_position(step)
        tokens = None if header.tokens is None or first is None else header.tokens[0]
        shown = step > 0 and tokens is not None and first is not None and first < len(tokens)
        rows.append(
            StepRow(
                step=step,
                token=header.text_of(tokens[first]) if shown and tokens is not None and first is not None else None,
                position=first,
                amax=amax,
                headroom=None if amax is None else number_format(header.dtype).headroom(amax),
                site=None if top is None else top.site,
                label=None if top is None else top.label,
                layer=None if top is None else top.layer,
                lost=sum(record.lost for record in records),
            )
        )
    return rows
