"""A backward pass that broke: which gradient overflowed first, how, which weights lost theirs, and what underflowed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stabilitykit.commands import training
from stabilitykit.diagnosis.causes import Cause
from stabilitykit.diagnosis.layers import peak, stored
from stabilitykit.diagnosis.places import places_of, where
from stabilitykit.formats import FORMATS
from stabilitykit.records import BACKWARD, Record, Recording
from stabilitykit.words import counted, listed, number

_MUCH = 0.01  # of all elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Underflow:
    """What of gradients is too small for a format: counts of elements.

    `subnormal` are below its normal range, and not 0 in it. `vanish` are not 0, in a wider dtype, and would be in the
    format. Of what is 0 already nobody knows whether it should be; `lost` are the weights in whose gradients nothing
    else is left.
    """

    elements: int
    subnormal: int
    vanish: int
    lost: tuple[str, ...]


def _how_to_try() -> str:
    return f"`{training()}` runs the step and tries what helps."


def of(record: Record) -> str:
    """The site or the parameter that a gradient is of."""
    return record.site.removeprefix(f"{BACKWARD}/")


def weight_gradients(recording: Recording) -> list[Record]:
    """The gradients of parameters, in the order in which they were made; of several passes all."""
    return [record for record in recording if record.is_gradient and record.of_weight]


def underflow(records: Iterable[Record], form: str = "float16") -> Underflow:
    """What of these gradients is too small for the format. The counts of several formats must include it."""
    held = [record for record in records if record.dtype in (form, "float32") and form in record.formats]
    own = [record for record in held if record.dtype == form]
    wide = [record for record in held if record.dtype != form]
    return Underflow(
        elements=sum(record.elements for record in held),
        subnormal=sum(record.subnormal for record in own) + sum(record.formats[form].subnormal for record in wide),
        vanish=sum(record.formats[form].zero for record in wide),
        lost=tuple(dict.fromkeys(of(r) for r in held if r.of_weight and r.zero + _vanish(r, form) == r.elements)),
    )


def _vanish(record: Record, form: str) -> int:
    return 0 if record.dtype == form else record.formats[form].zero


def first_gradient(recording: Recording, first: Record) -> str:
    """`The forward pass is finite (…). In the backward pass float16 overflows in the gradient of …`"""
    broke = first.broke
    assert broke is not None
    lost = counted(broke.count, "element")
    if not recording.header.backward:
        return f"After the backward pass {_parameters(recording, first)} not finite ({lost})."
    place = f"the gradient of {of(first)}{_scale(recording)}{places_of(recording, broke, first.step)} ({lost})"
    before = _forward(recording, first)
    match broke.kind:
        case "overflow":
            how = f"{_made(first)} exceeds the {first.dtype} maximum, {number(broke.limit)}"
            return f"{before}{first.dtype} overflows in {place}: {how}."
        case "reduction":
            return (
                f"{before}{first.dtype} overflows in {place}: the result, {number(broke.value)}, fits, but a partial "
                f"sum exceeds the {first.dtype} maximum, {number(broke.limit)}."
            )
        case "invalid" | "division-by-zero":
            lost = "NaN" if broke.kind == "invalid" else "infinite"
            return f"{before}{_capital(place)} is {lost}: {_made(first)}."
        case "input" if broke.origin_name is not None and broke.origin_name.endswith(".grad"):
            return f"{before}{_capital(place)} is not finite: it was not before this backward pass, which adds to it."
        case "input":
            return f"{before}{_capital(place)} is the first that is not finite: {broke.origin_name} is not."
    if broke.origin_finite is False:
        return (
            f"{before}{_capital(place)} is the first that is not finite: it is computed from {broke.origin_name}, "
            "which the forward pass left not finite."
        )
    return f"{before}{_capital(place)} is the first that is not finite."


def cause_of(recording: Recording, record: Record) -> Cause:
    """Why a backward pass broke, which weights have lost their gradients, and what may help."""
    broke, form = record.broke, FORMATS.get(record.dtype)
    assert broke is not None
    wide = (form is not None and form.bits > 16) or record.dtype == "bfloat16"
    if not recording.header.backward:
        remedy = (
            "Use a smaller loss scale, or run the backward pass in a format with a wider range (bfloat16, float32)."
        )
        if wide:
            remedy = (
                "Look at what the loss divides by, and at operators whose slope is infinite where they are evaluated."
            )
        return Cause(
            "backward",
            "Everything before that, the loss included, was finite. Which operator of the backward pass made it so was "
            f"not recorded: `record(model, backward=True)` does. {_how_to_try()}",
            remedy,
        )
    return Cause("backward", _spread(recording, record), _remedy(recording, record, wide=wide))


def clean(recording: Recording) -> str:
    """After a sentence on the forward pass: that gradients are finite too, and what underflows; empty without any."""
    gradients = [record for record in recording if record.is_gradient]
    if not gradients:
        return ""
    top = peak(record for record in gradients if record.dtype == recording.header.dtype)
    largest = "" if top is None else f" The largest gradient is {number(top.amax)}, of {of(top)}{_scale(recording)}."
    return f"{largest}{_small(gradients)}"


def goes_on(recording: Recording, first: Record) -> str:
    """What a break of the forward pass comes to in the backward pass; empty for none, and for one of a gradient."""
    lost = next((r for r in recording if r.is_gradient and r.lost and r.order > first.order), None)
    if first.is_gradient or lost is None:
        return ""
    without, _ = spread(recording, lost)
    weights = f", nor {'is that' if len(without) == 1 else 'are those'} of {counted(len(without), 'weight')}"
    return f"In the backward pass the gradient of {of(lost)} is not finite{weights if without else ''}."


def spread(recording: Recording, first: Record) -> tuple[Sequence[Record], Sequence[Record]]:
    """Of the weights' gradients made after this one in the same step: those that are not finite, and all of them."""
    after = [r for r in weight_gradients(recording) if r.step == first.step and r.order >= first.order]
    return [record for record in after if record.lost], after


def scale_of(loss_scale: float) -> str:
    """`2^16`, or the number where it is no power of two."""
    mantissa, _, power = float(loss_scale).hex().partition("p")
    return f"2^{int(power)}" if mantissa == "0x1.0000000000000" else number(loss_scale)


def pole(operator: str | None) -> str:
    """What helps where a derivative is not finite in any format."""
    return (
        f"In no format is the derivative of {operator or 'this operator'} finite there: keep its operand away from "
        "that point before the operator, since a `where` after it multiplies the gradient by 0, and 0 · inf is NaN."
    )


def _parameters(recording: Recording, record: Record) -> str:
    names = [of(r) for r in recording if r.step == record.step and r.is_gradient and r.broke]
    first = of(record)
    if len(names) < 2:
        return f"the gradient of {first} is"
    return f"the gradients of {first} and {counted(len(names) - 1, 'other parameter')} are"


def _forward(recording: Recording, first: Record) -> str:
    """That the forward pass is finite, if it is, and its largest magnitude."""
    forward = [record for record in recording if not record.is_gradient and record.order < first.order]
    if any(record.lost for record in forward):
        return ""
    top = peak(record for record in stored(recording) if record.order < first.order)
    if top is None:
        return ""
    return f"The forward pass is finite: its largest magnitude is {number(top.amax)}, in {where(top)}. "


def _scale(recording: Recording) -> str:
    scale = recording.header.case.get("loss_scale")
    return f" at loss scale {scale_of(scale)}" if isinstance(scale, int | float) and scale != 1 else ""


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _made(record: Record) -> str:
    """The arithmetic, with its numbers; a sentence goes on after it."""
    broke, operator = record.broke, record.operator or "an operator"
    assert broke is not None
    operands, value = broke.operands, broke.value
    if operator == "cast" and len(operands) == 1:
        return number(value)
    if operator == "add" and value is None and len(operands) == 2:
        return f"the sum of two gradients, which reach {number(operands[0])} and {number(operands[1])},"
    if operator == "add" and len(operands) == 2:
        return f"{number(operands[0])} + {number(operands[1])} = {number(value)}"
    if operator == "mul" and len(operands) == 2 and value is not None:
        product = operands[0] * operands[1]
        if abs(product - value) <= 0.01 * abs(value):
            return f"{number(operands[0])} · {number(operands[1])} = {number(value)}"
    result = f"gives {number(value)}" + (", which" if broke.kind == "overflow" else "")
    if not operands:
        return f"the derivative of {operator} {result}"
    saved = listed([number(operand) for operand in operands[1:]])
    if operator == "matmul":
        return f"a product of operands up to {number(operands[0])} and {saved or number(operands[0])} {result}"
    given = f"a gradient of {number(operands[0])}" if operands else "its gradient"
    return f"the derivative of {operator}, for {given}{f' and operands of {saved}' if saved else ''}, {result}"


def _spread(recording: Recording, first: Record) -> str:
    lost, after = spread(recording, first)
    if not lost:
        told = "No weight's gradient is lost by it." if after else ""
    elif len(lost) == len(after) > 3:
        told = f"From there on all {counted(len(after), 'weight gradient')} are lost."
    else:
        names = listed([of(record) for record in lost], most=3)
        told = f"{counted(len(lost), 'weight gradient is', 'weight gradients are')} lost: {names}."
    return f"{told}{_small([r for r in recording if r.is_gradient and not r.lost])}".strip()


def _small(gradients: Sequence[Record]) -> str:
    """What underflows in 16 bits, if much does."""
    found = underflow(gradients)
    if not found.elements:
        return ""
    said = []
    if found.lost:
        said.append(f"every element of the gradient of {listed(found.lost, most=3)} is 0, or too small for float16")
    vanish, subnormal = found.vanish / found.elements, found.subnormal / found.elements
    if vanish + subnormal >= _MUCH:
        said.append(
            f"of all gradients' elements {subnormal:.1%} are subnormal in float16, and {vanish:.1%}, now stored wider, "
            "would be 0"
        )
    return f" {_capital(listed(said))}." if said else ""


def _remedy(recording: Recording, record: Record, *, wide: bool) -> str:
    broke = record.broke
    assert broke is not None
    if broke.kind == "input":
        name = broke.origin_name or ""
        if name.endswith(".grad"):
            return "Set gradients to zero, or to None, before the pass: whatever is added to infinity stays lost."
        return "Look at what is passed to backward()."
    if broke.origin_finite is False:
        return (
            f"Mend the forward pass at {broke.origin_name} first: what hides it there does not hide it from autograd."
        )
    if broke.kind in ("invalid", "division-by-zero"):
        return pole(record.operator)
    if broke.kind == "unresolved":
        return f"How it came about could not be computed again. {_how_to_try()}"
    if wide:
        why = f"No loss scale was too large for {record.dtype} by chance"
        return f"{why}: look at what the loss divides by. {_how_to_try()}"
    scale = recording.header.case.get("loss_scale")
    smaller = "scale the loss down" if not isinstance(scale, int | float) else "use a smaller loss scale"
    fewer = "; GradScaler skips such a step and halves its scale" if isinstance(scale, int | float) else ""
    return (
        f"Candidates, untried: {smaller}{fewer}; compute {of(record)} in float32; or train in bfloat16 or float32. "
        f"{_how_to_try()}"
    )
