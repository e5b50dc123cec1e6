"""Causes outside the model: a sampler, a logits processor, the user's own code, a loss."""

import math
import re

from stabilitykit.diagnosis.causes import Cause
from stabilitykit.diagnosis.gradients import cause_of
from stabilitykit.diagnosis.logits import logits_of
from stabilitykit.diagnosis.outcome import OUTSIDE
from stabilitykit.formats import FORMATS
from stabilitykit.records import Break, Record, Recording
from stabilitykit.words import number

_PROCESSOR = re.compile(r"\w*(?:Processor|Warper)")
_LOSSES = ("nll_loss", "cross_entropy")


def is_outside(record: Record) -> bool:
    """Whether code that is not the model's made the record; the kit's own sampler counts as part of the model."""
    return record.site.startswith(OUTSIDE)


def place_outside(record: Record) -> str:
    """`outside the model, in train.py:12: z = m(x) * 1e6 (operator mul)`; the site where no line is known."""
    told = None if record.broke is None else record.broke.outside
    operator = f" (operator {record.operator})" if record.operator else ""
    return f"outside the model, in {shortened(told) if told else record.site}{operator}"


def shortened(code: str, most: int = 100) -> str:
    """File, line and source, the end of a long line left out."""
    return code if len(code) <= most else f"{code[:most].rstrip()}..."


def processor_of(record: Record) -> str | None:
    """The class of the logits processor that was running, of transformers' or the user's; None for other code."""
    told = None if record.broke is None else record.broke.outside
    return told if told is not None and _PROCESSOR.fullmatch(told) else None


def of_outside(recording: Recording, record: Record) -> Cause | None:
    """The cause of a break outside the model or in its sampler; None for one inside."""
    if record.is_gradient:
        return cause_of(recording, record)
    processor = processor_of(record)
    if processor is not None and is_outside(record):
        return _of_processor(recording, record, processor)
    if record is logits_of(recording, record.step):
        return None
    if record.site.startswith(("sampler/", "outside/")) and record.broke is not None and record.broke.outside is None:
        found = _of_sampler(recording, record)
        if found is not None:
            return found
    return _of_code(recording, record) if is_outside(record) else None


def _of_processor(recording: Recording, record: Record, processor: str) -> Cause:
    broke = record.broke
    assert broke is not None
    if broke.kind == "overflow":
        temperature = recording.header.case.get("temperature")
        if processor.startswith("Temperature"):
            by = f", {temperature}" if isinstance(temperature, int | float) else ""
            return _of_temperature(record, f"{processor} divides them by the temperature{by}, and they overflow")
        return Cause(
            "processor",
            f"The logits are finite. What overflows {record.dtype} is {processor}.",
            "Look at that processor's settings, or let it compute in float32.",
        )
    if broke.kind != "masked-row":
        return Cause(
            "processor",
            f"The logits are finite. {processor} makes scores that are not.",
            "Look at that processor's settings: at what it adds, multiplies by and divides by.",
        )
    return Cause(
        "processor",
        f"The logits are finite. {processor} left no token: every score is -inf, and a softmax of that is 0 / 0. "
        "Greedy decoding raises nothing and takes token 0.",
        "That is a setting of generate(), whatever the dtype: let the processors leave at least one token.",
    )


def _of_temperature(record: Record, how: str) -> Cause:
    value = None if record.broke is None else record.broke.value
    fits = value is not None and not FORMATS["float32"].overflows(value)
    wide = "; in float32 they would not" if fits and record.dtype != "float32" else ""
    divide = ", or divide in float32" if wide else ""
    return Cause(
        "temperature",
        f"The logits are finite. {how} {record.dtype}{wide}.",
        f"Use greedy decoding instead of a tiny temperature{divide}.",
    )


def _of_sampler(recording: Recording, record: Record) -> Cause | None:
    """Of the kit's own sampler, and of transformers' as the kit calls it: both say how they were asked to sample."""
    case, broke = recording.header.case, record.broke
    assert broke is not None
    temperature, top_k, top_p = (case.get(name) for name in ("temperature", "top_k", "top_p"))
    healthy = "The logits are finite; the failure is the sampler's own, in any dtype."
    renormalised = "all probabilities are zero, and renormalising them is 0 / 0."
    if broke.kind == "overflow" and isinstance(temperature, int | float):
        return _of_temperature(record, f"Divided by the temperature {temperature} they overflow")
    if broke.kind in ("overflow", "reduction"):
        return None
    if isinstance(top_k, int) and top_k <= 0:
        return Cause(
            "top-k",
            f"{healthy} top_k = {top_k} keeps no token: {renormalised}",
            "Use top_k of at least 1; to switch it off, the vocabulary's size.",
        )
    if isinstance(top_p, int | float) and top_p <= 0:
        return Cause(
            "top-p",
            f"{healthy} top_p = {top_p} keeps no token: {renormalised}",
            "Use top_p between 0 and 1; 1 switches it off.",
        )
    return None


def _of_code(recording: Recording, record: Record) -> Cause:
    broke = record.broke
    assert broke is not None
    labels = of_labels(record)
    if labels is not None:
        return labels
    head = logits_of(recording, record.step)
    model = "The model's output is finite; " if record.step not in recording.header.lost_steps else ""
    later = any(step > record.step for step in recording.header.lost_steps)
    if record.step < 0 or later:  # what the user's code made was passed to the model
        return Cause("outside", "This is not the model's own code, which is given the result.", _look_at(broke))
    if head is not None and not head.lost:
        model = "The logits are finite; "
    code = f"{model}what follows is not the model's." if model else "This is not the model's own code."
    if broke.kind in ("overflow", "reduction"):
        value = broke.value
        fits = value is not None and not math.isnan(value) and not FORMATS["float32"].overflows(value)
        wide = fits and (record.dtype == "float16" or record.dtype.startswith("float8"))
        return Cause("outside", code, "Compute this in float32, which holds the value." if wide else _look_at(broke))
    operands = " and ".join(number(operand) for operand in broke.operands)
    return Cause("outside", code, f"Look at its operands: {operands}." if operands else "Look at that code.")


def _look_at(broke: Break) -> str:
    return f"Look at {shortened(broke.outside) if broke.outside else 'that code'}."


def of_labels(record: Record) -> Cause | None:
    """The mean over no labels at all: a loss of finite log-probabilities is NaN only where it counts none."""
    broke = record.broke
    assert broke is not None
    operator = record.operator or ""
    is_loss = any(operator.startswith(name) for name in _LOSSES)
    told = f"{record.site} {broke.outside or ''}".lower()
    divides = operator in ("div", "mean") and "loss" in told and not any(broke.operands)
    if broke.kind != "invalid" or not (is_loss or divides):
        return None
    return Cause(
        "labels",
        "The loss is a mean over no labels, 0 / 0: every label is one that the loss ignores (-100), in any format."
        if is_loss
        else "The loss is 0 / 0, a mean over nothing, in any format.",
        "Look at the labels of this batch; at least one must count.",
    )
