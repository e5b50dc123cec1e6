"""What broke first, with its numbers, and which prompts it happens to."""

from stabilitykit.diagnosis.gradients import first_gradient
from stabilitykit.diagnosis.origins import UNNAMED, constant_source, source_of
from stabilitykit.diagnosis.outside import is_outside, place_outside, processor_of
from stabilitykit.diagnosis.parts import part_of
from stabilitykit.diagnosis.places import channel_of, expert_of, head_of, places_of, where
from stabilitykit.records import Break, Record, Recording
from stabilitykit.words import escaped, number

_SIGNS = {"add": "+", "sub": "-", "mul": "·", "div": "÷"}

# Pointwise operators of one operand, of which a break's record has that very operand.
_OF_ONE = frozenset(
    "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square pow cosh sinh tan atanh acosh logit erfinv "
    "lgamma digamma neg abs".split()
)


def first_sentence(recording: Recording, first: Record) -> str:
    """`float16 overflows in layer 7, …, at token 0 '<bos>', channel 443: 55,008 + 13,376 = 68,384 exceeds …`"""
    broke, dtype = _broke(first), first.dtype
    if first.is_gradient:
        return first_gradient(recording, first)
    outside = is_outside(first)
    place = place_outside(first) if outside else where(first) + _inside(recording, first)
    channel = channel_of(recording, first)
    place += places_of(recording, broke, first.step) + channel
    count = "" if broke.count == 1 else f" ({broke.count:,} elements of this tensor)"
    if outside and processor_of(first) is not None and broke.kind not in ("overflow", "reduction"):
        return f"{place[0].upper()}{place[1:]}, the scores are not finite{count}."
    subject = (f"What is made {place}" if outside else place) + ("," if channel else "")
    match broke.kind:
        case "overflow":
            maximum = f"the {dtype} maximum, {number(broke.limit)}"
            at = place if outside else f"in {place}"
            return f"{dtype} overflows {at}{count}: {_made(first)} exceeds {maximum}."
        case "reduction":
            at = place if outside else f"in {place}"
            return (
                f"{dtype} overflows {at}{count}: the result, {number(broke.value)}, fits, but a partial sum "
                f"exceeds the {dtype} maximum, {number(broke.limit)}."
            )
        case "invalid" | "division-by-zero":
            lost = "NaN" if broke.kind == "invalid" else "infinite"
            return f"{subject} is {lost}{count}: {_made(first, which='')}."
        case "masked-row":
            return f"{subject} is NaN{count}: every key of that row is masked."
        case "weight" | "input" | "constant":
            return f"{subject} is the first tensor that is not finite{count}, {_source(broke)}."
        case "unresolved":
            return f"{subject} is the first tensor that is not finite{count}."


def dependence(recording: Recording, first: Record) -> str:
    """Which prompts break alike, as far as it was checked that nothing later in the sequence took part."""
    broke = _broke(first)
    position, token = broke.position, broke.token
    if not broke.causal or broke.kind not in ("overflow", "reduction") or position is None or first.layer is None:
        return ""
    if is_outside(first) or broke.counts != "token" or _is_padding(recording, broke):
        return ""
    if "experts" in first.module.split("."):  # which tokens an expert gets may depend on all of them
        return ""
    if position == 0:
        text = escaped(recording.header.text_of(token) or "")
        named = "" if token is None else f", {text}" if text else f" (id {token})"
        return f"This depends only on the first token{named}: every prompt that starts with it overflows here."
    return f"This depends only on the first {position + 1} tokens: every prompt that starts with them overflows here."


def _is_padding(recording: Recording, broke: Break) -> bool:
    """Whether the token stands before a prompt to fill its row, as far as the rows of a batch show it."""
    header, position = recording.header, broke.position or 0
    padding = header.case.get("left_padding", 0)
    if isinstance(padding, int) and position < padding:
        return True
    rows = header.tokens
    if rows is None or len(rows) < 2 or broke.row is None or broke.row >= len(rows):
        return False
    begins = {row[0] for row in rows if row}
    return len(begins) > 1 and set(rows[broke.row][: position + 1]) == {broke.token}


def _inside(recording: Recording, first: Record) -> str:
    """The head or the expert, where the break's index or the module's path says which."""
    if first.operator == "matmul" and part_of(recording, first) == "scores":
        return head_of(recording, first) + expert_of(first)
    return expert_of(first)


def _source(broke: Break) -> str:
    source = source_of(broke)
    if broke.kind == "constant":
        return constant_source(broke)
    named = broke.origin_name not in (None, UNNAMED)
    match broke.origin_kind:
        case "input" if named:
            return f"because the input {source} is not"
        case "buffer":
            return f"because the buffer {source} is not"
        case "cache":
            return f"because {source}, a cache, is not" if named else "because a cache is not"
        case "outside":
            return f"because {source if named else 'what comes'} from outside the model is not"
    return f"because {source} is not"


def _made(record: Record, which: str = ", which") -> str:
    """The arithmetic that broke, with its numbers: `60,000 + 8,000 = 68,000`, or `exp of 99 gives inf`.

    To the second one `which` is added, for a verb to follow.
    """
    broke = _broke(record)
    operator, operands = record.operator or "the operator", broke.operands
    if broke.value is None and not operands:
        return f"{operator} gives a value that could not be recomputed{which}"
    sum_of_two = _equation(operator, operands, broke.value)
    if sum_of_two is not None:
        return sum_of_two
    if operator == "cast" and len(operands) == 1:
        return number(operands[0])
    numbers = " and ".join(number(operand) for operand in operands)
    if not numbers:
        of = ""
    elif operator in _SIGNS or operator in _OF_ONE:
        of = f" of {numbers}"
    else:
        of = f" of operands up to {numbers}"
    return f"{operator}{of} gives {number(broke.value)}{which}"


def _equation(operator: str, operands: tuple[float, ...], value: float | None) -> str | None:
    """`60,000 + 8,000 = 68,000`, in the order in which it is true; None where it is not that simple."""
    sign = _SIGNS.get(operator)
    if sign is None or len(operands) != 2 or value is None:
        return None
    for left, right in (operands, operands[::-1]):
        if _is_near(_result(sign, left, right), value):
            shown = f"({number(right)})" if right < 0 and sign in "+-" else number(right)
            return f"{number(left)} {sign} {shown} = {number(value)}"
    return None


def _result(sign: str, left: float, right: float) -> float:
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "·":
        return left * right
    if right == 0 or right != right:
        return float("nan") if left == 0 or left != left else float("inf") if left > 0 else float("-inf")
    return left / right


def _is_near(found: float, value: float) -> bool:
    if found != found or value != value:
        return found != found and value != value
    return found == value or abs(found - value) <= 0.01 * abs(value) or abs(found) == abs(value) == float("inf")


def _broke(record: Record) -> Break:
    if record.broke is None:
        raise ValueError(f"{record.site} did not break")
    return record.broke
