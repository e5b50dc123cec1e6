"""What a failure was, and what only looked like it: float16's range, or one of its look-alikes.

They all end in the same error. What tells them apart is where the first break sits, of what kind it is, where its
damage came from, and what loading the weights reported.
"""

from collections.abc import Sequence

from stabilitykit.diagnosis.causes import Cause, CauseName
from stabilitykit.diagnosis.origins import may_be_weights, of_file, of_origin
from stabilitykit.diagnosis.outcome import decisive
from stabilitykit.diagnosis.outside import of_labels, of_outside, shortened
from stabilitykit.diagnosis.ranges import fact, remedy
from stabilitykit.diagnosis.untried import by_running
from stabilitykit.formats import FORMATS
from stabilitykit.records import Record, Recording
from stabilitykit.words import counted, listed, number

__all__ = ["Cause", "CauseName", "cause"]


def cause(recording: Recording) -> Cause | None:
    """Why the run broke; None when it did not.

    Looks at what loading reported first (`case["loading"]`), because wrong weights explain everything after
    them, then at the first break that is not harmless.
    """
    found = decisive(recording)
    if found is None or found.broke.broke is None:
        return None
    of_loading = _of_loading(recording)
    if of_loading is not None:
        return of_loading
    if found.harmless and found.ending is not None:
        return Cause("harmless", f"An overflow ends without loss: {found.ending.how}.", "", shown=False)
    first, broke = found.broke, found.broke.broke
    by_place = of_outside(recording, first) or of_origin(recording.header, first)
    if by_place is not None:
        return by_place
    match broke.kind:
        case "unresolved":
            return _unresolved(recording, first)
        case "masked-row":
            return _masked_row(first)
        case "overflow" | "reduction":
            said = fact(recording, first)
            plain = "The number format is too narrow for this value; every operand before it was finite."
            return Cause("range", said or plain, remedy(recording, first), shown=bool(said))
    return _invalid(recording, first)


def _of_loading(recording: Recording) -> Cause | None:
    loading = recording.header.case.get("loading", {})
    unexpected: Sequence[str] = loading.get("unexpected", ())
    missing: Sequence[str] = loading.get("missing", ())
    scalers = [name for name in unexpected if name.endswith("weight_scaler")]
    if scalers:
        return Cause(
            "int8-scalers-dropped",
            f"The checkpoint holds int8 weights and {counted(len(scalers), 'scaler')} for them ({listed(scalers, 1)}) "
            "that the model has no place for. Loaded without them every weight is an integer up to 127 instead of a "
            "small fraction, so the failure is in the weights, not in the number format.",
            "Build the model with quantised layers, or multiply each row by its scaler before loading.",
        )
    if missing:
        return Cause(
            "parameter-names",
            f"The checkpoint lacks {counted(len(missing), 'parameter')} of the model by name ({listed(missing, 1)}; it "
            f"has {', '.join(unexpected[:2]) or 'nothing else'} instead), and `strict=False` left uninitialised what "
            "it lacks: whatever the memory held was run as weights.",
            "Load with strict=True and rename the parameters it lists.",
        )
    return None


def _unresolved(recording: Recording, first: Record) -> Cause:
    """What was not seen is not guessed: neither the range of the format nor anything else."""
    weights = recording.header.weights
    if weights is not None and weights.nonfinite and recording.header.checkpoint is not None:
        return of_file(weights)
    if recording.header.level != "operators":
        if weights is not None and weights.overflow:
            return may_be_weights(weights)
        return Cause(
            "unresolved",
            f"Why is not known: of {recording.header.level} only what they return was recorded, and a value out of "
            "range, a mask, a weight and an operation without a finite result look alike from there.",
            "Record operators to see how.",
        )
    return Cause(
        "unresolved",
        f"How {first.operator or first.site} came to it was not seen: its result could not be computed again in a "
        "wider format.",
        f"Run the same in float32{by_running('profile', recording.header, 'float32')}: if it is finite there, this "
        "dtype is the reason.",
    )


def _masked_row(first: Record) -> Cause:
    broke = first.broke
    assert broke is not None
    if broke.rounded_site is not None:
        was = "" if broke.rounded_from is None else f" ({number(broke.rounded_from)})"
        return Cause(
            "masked-row",
            f"The mask alone does not hide every key of that row: in {broke.rounded_site} score and mask add up to "
            f"less than the {first.dtype} minimum{was} and become -inf, in this dtype only, and the softmax of a row "
            "of -inf is 0 / 0.",
            "Give masked positions half of the dtype's minimum, or pass a boolean mask.",
        )
    made = (
        ""
        if broke.outside is None
        else f" What hides them comes from outside the model, from {shortened(broke.outside)}."
    )
    return Cause(
        "masked-row",
        "A row of the attention mask hides every key (-inf throughout), and the softmax of such a row is 0 / 0, in any "
        f"dtype. Every number before the mask is in range.{made}",
        "Let each position see at least itself, whatever padding or a sliding window hides from it, or use a finite "
        "number in place of -inf, such as half of the dtype's minimum.",
    )


def _invalid(recording: Recording, first: Record) -> Cause:
    """NaN or an exact infinity out of finite operands, which this dtype's rounding may have made what they are."""
    broke = first.broke
    assert broke is not None
    operator = first.operator or first.site
    if broke.rounded_site is not None:
        return _rounded(first)
    labels = of_labels(first)
    if labels is not None:
        return labels
    if operator == "mean" and broke.kind == "invalid":
        return Cause(
            "invalid-operation",
            "It is the mean of no elements, 0 / 0, in any format.",
            "Look at what is averaged: a tensor without elements, such as the tokens of an expert that got none.",
        )
    said = f"{operator} has no finite result for its finite operands ({broke.kind}), in any format."
    if _was_given(recording, first):
        return Cause("invalid-operation", said, "Look at its operands; a wider format will not help.")
    return Cause(
        "invalid-operation",
        f"{said} Whether a wider format would have given it these operands is not known.",
        "Look at its operands, and compare them with those of a run in a wider format.",
    )


def _was_given(recording: Recording, first: Record) -> bool:
    """Whether no operand was computed, so that no rounding of this run made it what it is."""
    broke = first.broke
    assert broke is not None
    computed = {record.site for record in recording if record.step == first.step}
    return bool(broke.operand_sites) and broke.origin_kind != "computed" and not computed & set(broke.operand_sites)


def _rounded(first: Record) -> Cause:
    broke, form = first.broke, FORMATS.get(first.dtype)
    assert broke is not None
    was = broke.rounded_from
    source = "a constant" if broke.rounded_site == "constant" else broke.rounded_site
    if was is not None and form is not None and form.overflows(was):
        return Cause(
            "rounding",
            f"That is this dtype's rounding: {source} is infinite in {first.dtype} alone. In a wider format it is "
            f"{number(was)}, and the result finite.",
            "Compute this in float32.",
        )
    single = FORMATS["float32"]
    lost = was is not None and abs(was) < single.smallest_normal  # float32 would round it too, or its inverse overflow
    wider = "float64" if first.dtype == "float32" or lost else "float32"
    told = "" if was is None else f" In {wider} it is {number(was)}, and the result finite."
    least = "" if form is None else f": its least number is {form.smallest_subnormal:.2g}"
    other = f", or use an eps that {first.dtype} does not round to 0{least}"
    if (first.operator or "").startswith("log"):
        other = ", or use log_softmax" if "softmax" in (broke.rounded_site or "") else ""
    if was is not None and form is not None and abs(was) > form.smallest_subnormal:
        onto = f" to {number(broke.operands[0])}" if len(broke.operands) == 1 else ""
        return Cause(
            "rounding",
            f"That is this dtype's rounding: {source} is rounded{onto} in {first.dtype}.{told}",
            f"Compute this in {wider}.",
        )
    return Cause(
        "rounding",
        f"That is this dtype's rounding: {source} is 0 in {first.dtype}{'' if lost else ' alone'}.{told}",
        f"Compute this in {wider}{other}.",
    )
