"""The very operator that broke, in float32, and rounded where it fits again."""

from collections.abc import Iterator

from stabilitykit.remedies.float32_islands import in_float32_at
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import Situation
from stabilitykit.words import counted

OPERATOR = "float32 operator"
_NAMES = {"scores": "float32 scores", "logits": "float32 logits", "mask": "mask in float32"}
OPERATORS = (OPERATOR, *_NAMES.values())
"""What the candidates are called in which only the operator that broke is computed in float32."""

_GIVEN = ("weight", "input", "constant")  # kinds of breaks that were there before any operator


def wider_operator(situation: Situation) -> Iterator[Candidate]:
    """For whatever an operator of the model made in 16 bits."""
    broke, kind = situation.broke, situation.kind
    if broke is None or broke.operator is None or broke.broke is None or kind in _GIVEN or broke.is_gradient:
        return
    low = situation.reproduction.dtype
    if low not in ("float16", "bfloat16") or broke.dtype != low:
        return
    hides = kind == "masked-row"
    if hides and broke.broke.rounded_site is None:  # a softmax without any key has no value in any format
        return
    own, rounded, scores = situation.alike(), situation.rounded(), situation.to_softmax()
    leaves = f"leaves {low}'s range" if kind in ("overflow", "reduction") else "breaks"
    what = f"{broke.operator} in float32, in the {counted(len(own), 'place')} where it {leaves}"
    if rounded:
        what = f"{broke.operator} and what it is given, from {rounded[0]} on, in float32"
    elif scores:
        what = f"scores in float32 until their softmax, in the {counted(len(own), 'layer')} where they overflow"
    yield Candidate(
        name=_NAMES.get("mask" if hides else situation.part or "", OPERATOR),
        summary=f"Computes {what}, and rounds to {low} what is made of it.",
        command=f"# in {broke.module or 'the model'}: {broke.operator}(operand.float()), and .to(torch.{low}) of what "
        "is made of its result",
        around=in_float32_at(situation.low, dict.fromkeys([*own, *rounded, *scores]), low),
        extra=2 * broke.elements,  # one tensor at a time
    )
