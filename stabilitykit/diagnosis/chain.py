"""From the first break to the sampler: where infinity became NaN, what each layer lost, how it came out.

Works on records alone. What it says of layers holds for decoders whose sites carry Hugging Face's names; of
other models it still finds the first break, the first NaN and the error.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stabilitykit.records import Record, Recording
from stabilitykit.words import counted

Event = Literal["break", "first NaN", "layer", "logits", "probabilities", "error", "greedy"]

_LOGITS = ("logits", "logits, soft-capped")

# The only ways these operators make NaN of operands that hold none (IEEE 754, section 7.2).
_INVALID = {
    "mul": "inf · 0",
    "add": "inf - inf",
    "sub": "inf - inf",
    "div": "inf / inf or 0 / 0",
    "matmul": "inf · 0 or inf - inf in a sum of products",
    "softmax": "inf - inf",
    "sum": "inf - inf",
    "mean": "inf - inf",
    "gelu": "-inf · 0",
    "cos": "the cosine of inf",
    "sin": "the sine of inf",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One step of the chain. Counts are of elements, `lost_*` of positions and channels that hold a lost one."""

    event: Event
    site: str | None
    label: str | None = None
    layer: int | None = None
    operator: str | None = None
    infinite: int = 0
    nan: int = 0
    elements: int = 0
    lost_positions: int = 0
    positions: int | None = None
    lost_channels: int = 0
    channels: int | None = None
    text: str


def logits_of(recording: Recording, step: int = 0) -> Record | None:
    """The logits of a step: what the head made, after a soft-cap if there is one. None where there is no head."""
    made = [r for r in recording if r.step == step and (r.site == "lm_head" or r.label in _LOGITS)]
    return made[-1] if made else None


def chain(recording: Recording) -> tuple[Link, ...]:
    """The links in order of execution; empty when nothing broke and nothing was raised."""
    return tuple(_links(recording))


def _links(recording: Recording) -> Iterator[Link]:
    first = recording.first_break()
    step = first.step if first else 0
    if first is not None and first.broke is not None:
        named = recording.header.named(first.broke.token)
        at = "" if first.broke.position is None else f" at position {first.broke.position}"
        token = f" {named}" if named else ""
        yield _link("break", first, f"{first.broke.kind}: {counted(first.lost, 'element')} lost{at}{token}")

        after = [r for r in recording if r.step == step and r.order >= first.order]
        nan = next((r for r in after if r.nan), None)
        if nan is not None and nan is not first:
            how = _INVALID.get(nan.operator or "", "an invalid operation")
            yield _link("first NaN", nan, f"{how} makes {counted(nan.nan, 'NaN', 'NaN')}")
        layers = {r.layer: r for r in after if r.layer is not None and r.site.endswith(f"layers.{r.layer}")}
        for record in layers.values():
            if record is not first and record.lost:
                yield _link("layer", record, _losses(record))
        logits = logits_of(recording, step)
        if logits is not None and logits.lost:
            share = (
                "every logit is" if logits.lost == logits.elements else counted(logits.lost, "logit is", "logits are")
            )
            what = "NaN" if logits.nan == logits.lost else "infinite" if not logits.nan else "NaN or infinite"
            yield _link("logits", logits, f"{share} {what}")
        probabilities = next((r for r in after if r.site == "sampler/softmax.0" and r.lost), None)
        if probabilities is not None:
            lost = counted(probabilities.nan, "probability is", "probabilities are")
            yield _link("probabilities", probabilities, f"{lost} NaN")
    if recording.header.error is not None:
        yield Link(event="error", site="sampler", text=recording.header.error)
    greedy = recording.header.case.get("greedy_text")
    if first is not None and greedy is not None:
        yield Link(
            event="greedy",
            site="sampler",
            text=f"greedy decoding raises nothing and prints {greedy}, the argmax of NaN",
        )


def _link(event: Event, record: Record, text: str) -> Link:
    return Link(
        event=event,
        site=record.site,
        label=record.label,
        layer=record.layer,
        operator=record.operator,
        infinite=record.positive_inf + record.negative_inf,
        nan=record.nan,
        elements=record.elements,
        lost_positions=record.lost_positions,
        positions=record.positions,
        lost_channels=record.lost_channels,
        channels=record.channels,
        text=text,
    )


def _losses(record: Record) -> str:
    infinite = record.positive_inf + record.negative_inf
    kinds = [f"{count:,} {name}" for count, name in ((infinite, "inf"), (record.nan, "NaN")) if count]
    return (
        f"{' and '.join(kinds)}, in {record.lost_positions} of {counted(record.positions or 0, 'token')} "
        f"and {record.lost_channels:,} of {record.channels or 0:,} channels"
    )
