"""From the first break to the sampler: where infinity became NaN, what each layer lost, how it came out.

Works on records alone. What it says of layers holds for decoders whose sites carry Hugging Face's names; of
other models it still finds the first break, the first NaN and the error.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stabilitykit.diagnosis.gradients import spread
from stabilitykit.diagnosis.logits import logits_of
from stabilitykit.diagnosis.outcome import Outcome, decisive, tells_outputs
from stabilitykit.diagnosis.outside import is_outside
from stabilitykit.diagnosis.places import channel_of
from stabilitykit.records import Record, Recording
from stabilitykit.records.layers import is_layer
from stabilitykit.words import counted

__all__ = ["Event", "Link", "chain", "logits_of"]

Event = Literal["break", "first NaN", "absorbed", "layer", "logits", "probabilities", "error", "greedy", "weights"]

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


def chain(recording: Recording) -> tuple[Link, ...]:
    """The links in order of execution; empty when nothing broke and nothing was raised."""
    return tuple(_links(recording))


def _links(recording: Recording) -> Iterator[Link]:
    found = decisive(recording)
    if found is not None:
        yield from _spread(recording, found)
    if recording.header.error is not None:
        yield Link(event="error", site="sampler", text=_first_line(recording.header.error))
    greedy = recording.header.case.get("greedy_text")
    if found is not None and greedy is not None:
        of = _chosen(recording)
        yield Link(event="greedy", site="sampler", text=f"greedy decoding raises nothing and prints {greedy}, {of}")


def _chosen(recording: Recording) -> str:
    """Of what the token is the argmax that greedy decoding takes where its logit is not finite."""
    logit = recording.header.case.get("greedy_logit")
    if logit is None:
        logits = logits_of(recording, max((record.step for record in recording), default=0))
        logit = "inf" if logits is not None and logits.lost and not logits.nan else "nan"
    told = {"inf": "the first infinite logit", "-inf": "the first of logits that are all -inf"}
    return told.get(str(logit), "the argmax of NaN")


def _spread(recording: Recording, found: Outcome) -> Iterator[Link]:
    first, broke = found.broke, found.broke.broke
    assert broke is not None
    named = recording.header.named(broke.token)
    at = "" if broke.position is None else f" at position {broke.position}"
    token = f" {named}" if named else ""
    place = f"{at}{token}{channel_of(recording, first)}"
    yield _link("break", first, f"{broke.kind}: {counted(first.lost, 'element')} lost{place}")

    after = [
        r for r in recording if r.step == first.step and r.order >= first.order and r.is_gradient == first.is_gradient
    ]
    nan = next((r for r in after if r.nan and is_outside(r) == is_outside(first)), None)
    if nan is not None and nan is not first and nan.broke is None:
        invalid = "inf · 0 or inf - inf" if nan.is_gradient else "an invalid operation"
        how = invalid if nan.is_gradient else _INVALID.get(nan.operator or "", invalid)
        yield _link("first NaN", nan, f"{how} makes {counted(nan.nan, 'NaN', 'NaN')}")
    if first.is_gradient:
        without, weights = spread(recording, first)
        if without:
            yield _link("weights", without[0], f"{len(without):,} of {counted(len(weights), 'weight gradient')} lost")
        return
    layers = {r.site: r for r in after if r.layer is not None and is_layer(r.site)}
    for record in layers.values():
        if record is not first and record.lost:
            yield _link("layer", record, _losses(record))
    if found.ending is not None:
        yield _link("absorbed", found.ending.record, found.ending.how)
    logits = logits_of(recording, first.step)
    ends_later = tells_outputs(recording) and first.step not in recording.header.lost_steps
    if logits is not None and logits.lost and not ends_later:
        share = "every logit is" if logits.lost == logits.elements else counted(logits.lost, "logit is", "logits are")
        what = "NaN" if logits.nan == logits.lost else "infinite" if not logits.nan else "NaN or infinite"
        yield _link("logits", logits, f"{share} {what}")
    probabilities = next((r for r in after if r.site == "sampler/softmax.0" and r.lost), None)
    if probabilities is not None:
        lost = counted(probabilities.nan, "probability is", "probabilities are")
        yield _link("probabilities", probabilities, f"{lost} NaN")


def _first_line(error: str, most: int = 200) -> str:
    """An error's message without the tensors that some of them print."""
    line = error.strip().partition("\n")[0].removesuffix(":")
    return line if len(line) <= most else f"{line[:most]}..."


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
