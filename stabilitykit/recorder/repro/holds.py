"""Whether an operator, run alone, does what it did in the model: breaks in the same way, or absorbs what broke."""

from torch import Tensor

from stabilitykit.formats import FLOAT32, FORMATS, NumberFormat
from stabilitykit.recorder.breaks import Finding, judge
from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.repro.operation import Holds, Operation
from stabilitykit.recorder.tensors import NAMES, aside, measurable
from stabilitykit.records import BreakKind


def breaks_as(kind: BreakKind, value: float) -> Holds:
    """Holds where an element of the result becomes `value`, NaN or an infinity, and is judged as in a recording."""

    def holds(operation: Operation) -> bool:
        with aside():
            output = operation.outputs()[operation.result]
            lost = _is(measurable(output), value)
            return bool(lost.any()) and _kind(operation, output, lost) == kind

    return holds


def breaks_somehow(operation: Operation) -> bool:
    """Whether an element of the result is not finite."""
    with aside():
        return not bool(_finite(operation.outputs()[operation.result]).all())


def saturates(operation: Operation) -> bool:
    """Whether a cast makes another number of one that is past the largest of the format that it casts to."""
    if operation.operator != "cast":
        return False
    with aside():
        output = operation.outputs()[operation.result]
        (given,) = [tensor for _, tensor in operation.floating()]
        past = given.isfinite() & (given.abs() > FORMATS[NAMES[output.dtype]].largest)
        return bool(past.any()) and bool(output.float().isfinite().all())


def absorbs(operation: Operation) -> bool:
    """Whether the result is finite although an operand is not."""
    with aside():
        output = operation.outputs()[operation.result]
        lost = any(not bool(_finite(tensor).all()) for _, tensor in operation.floating())
        return lost and bool(_finite(output).all())


def result_of(operation: Operation) -> tuple[int, float] | None:
    """Which result is the one that was looked at, of its shape and not finite there, and what it is; None for none."""
    for number, output in enumerate(operation.outputs()):
        values = measurable(output)
        if values.shape == operation.shape and not bool(values[operation.index].isfinite()):
            return number, float(values[operation.index])
    return None


def _finite(tensor: Tensor) -> Tensor:
    return measurable(tensor).isfinite()


def _is(values: Tensor, value: float) -> Tensor:
    return values.isnan() if value != value else values == value


def _kind(operation: Operation, output: Tensor, lost: Tensor) -> BreakKind | None:
    call, values = operation.call(), measurable(output)
    stored: NumberFormat = FORMATS.get(NAMES[output.dtype], FLOAT32)
    found = judge(
        call,
        values,
        lost,
        Axes(tuple(values.shape)),
        stored,
        origin_of=lambda tensor: call.operands[0].origin,
        is_still=lambda tensor, origin: False,
    )
    return found.broke.kind if isinstance(found, Finding) else None
