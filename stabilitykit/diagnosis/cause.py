"""What a failure was, and what only looked like it: float16's range, or one of its look-alikes.

They all end in the same error. What tells them apart is where the first break sits, of what kind it is, and
what loading the weights reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stabilitykit.diagnosis.chain import logits_of
from stabilitykit.records import Recording
from stabilitykit.words import counted, listed

CauseName = Literal[
    "range",
    "int8-scalers-dropped",
    "parameter-names",
    "top-k",
    "top-p",
    "temperature",
    "masked-row",
    "weights",
    "input",
    "invalid-operation",
]


@dataclass(frozen=True, slots=True)
class Cause:
    """`sentence` says what happened, `remedy` what to do about it."""

    name: CauseName
    sentence: str
    remedy: str


def cause(recording: Recording) -> Cause | None:
    """Why the run broke; None when it did not.

    Looks at what loading reported first (`case["loading"]`), because wrong weights explain everything after
    them, then at the first break.
    """
    first = recording.first_break()
    if first is None or first.broke is None:
        return None
    case, broke = recording.header.case, first.broke
    loading = case.get("loading", {})
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
    weights = recording.header.weights
    if broke.kind == "weight" and weights is not None and weights.overflow and not weights.nonfinite:
        return Cause(
            "range",
            f"Stored in {weights.dtype}, {counted(weights.overflow, 'weight overflows', 'weights overflow')}, mostly "
            f"in {weights.worst[0].name}; the checkpoint itself is finite.",
            "Store the weights in a format with a wider range (bfloat16, float32).",
        )
    if broke.kind == "weight":
        return Cause(
            "weights",
            f"The weights were not finite to begin with: {', '.join(broke.operand_sites)}.",
            "Check how the checkpoint was written and cast; no number format helps.",
        )
    if broke.kind == "unresolved" and weights is not None and weights.nonfinite:
        worst, lost = weights.worst[0], counted(weights.nonfinite, "of them is", "of them are")
        more = ", ..." if worst.nonfinite < weights.nonfinite else ""
        return Cause(
            "weights",
            f"The weights were not finite to begin with: {lost} NaN or infinite in the "
            f"checkpoint itself ({worst.name}{more}).",
            "Check how the checkpoint was written and cast; no number format helps.",
        )
    if broke.kind == "input":
        return Cause(
            "input", "An input was not finite before the model touched it.", "Check what is passed to the model."
        )
    if first.site.startswith(("sampler", "outside")) and first is not logits_of(recording, first.step):
        return _sampler_cause(recording)
    if broke.kind == "masked-row":
        return Cause(
            "masked-row",
            "A row of the attention mask hides every key (-inf throughout), and the softmax of such a row is 0 / 0, in "
            "any dtype. Every number before the mask is in range.",
            "Let each position see at least itself, or use the dtype's minimum in place of -inf.",
        )
    if broke.kind in ("overflow", "reduction", "unresolved"):
        return Cause(
            "range",
            "The number format is too narrow for this value; every operand before it was finite.",
            "Use a format with a wider range (bfloat16, float32), or scale the residual stream down by a power of two.",
        )
    return Cause(
        "invalid-operation",
        f"{first.operator or first.site} has no finite result for its finite operands ({broke.kind}), in any format.",
        "Look at its operands; a wider format will not help.",
    )


def _sampler_cause(recording: Recording) -> Cause:
    case = recording.header.case
    first = recording.first_break()
    healthy = "The logits are finite; the failure is the sampler's own, in any dtype."
    if first is not None and first.broke is not None and first.broke.kind == "overflow":
        return Cause(
            "temperature",
            f"The logits are finite. Divided by the temperature {case.get('temperature')} they overflow "
            f"{recording.header.dtype}; in float32 they would not.",
            "Use greedy decoding instead of a tiny temperature, or divide in float32.",
        )
    if case.get("top_k", 1) <= 0:
        return Cause(
            "top-k",
            f"{healthy} top_k = {case.get('top_k')} keeps no token: all probabilities are zero, and renormalising them "
            "is 0 / 0.",
            "Use top_k of at least 1; to switch it off, the vocabulary's size.",
        )
    return Cause(
        "top-p",
        f"{healthy} top_p = {case.get('top_p')} keeps no token: all probabilities are zero, and renormalising them is "
        "0 / 0.",
        "Use top_p between 0 and 1; 1 switches it off.",
    )
