"""Sentences that stay right for any number of things."""

from collections.abc import Sequence

from stabilitykit.diagnosis.chain import counted
from stabilitykit.diagnosis.verdict import number
from stabilitykit.records import quoted
from stabilitykit.records.lengths import Span


def count(amount: int, one: str, many: str | None = None) -> str:
    """`1 case` · `12 cases` · `no cases`; `many` where an s will not do."""
    return counted(amount, one, many) if amount else f"no {many or one + 's'}"


def none_of(amount: int, one: str) -> str:
    """`not even the only case` · `none of 12 cases`, to be followed by a verb in the singular."""
    return f"not even the only {one}" if amount == 1 else f"none of {count(amount, one)}"


def listed(words: Sequence[str], most: int | None = None) -> str:
    """`a` · `a and b` · `a, b and c`; past `most`, how many more there are."""
    words = list(words)
    if most is not None and len(words) > most + 1:
        words = [*words[:most], f"{len(words) - most:,} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def code(text: object) -> str:
    """A name as it stands, between backticks; backticks of its own become apostrophes."""
    return f"`{str(text).replace('`', chr(39))}`"


def sentence(text: str) -> str:
    """With a capital and a full stop, for what came from elsewhere."""
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"


def tokens(amount: int) -> str:
    return count(amount, "token")


def with_bos(bos: bool | None, mark: str = "`") -> str:
    """`with <bos>` or `without <bos>`; nothing where it is not known."""
    return "" if bos is None else f"{'with' if bos else 'without'} {mark}<bos>{mark}"


def place(span: Span) -> str:
    """Where it broke: the layer, the name for people, the site."""
    layer = [] if span.layer is None else [f"layer {span.layer}"]
    named = [f"{span.label} ({code(span.site)})" if span.label else code(span.site)]
    return ", ".join(layer + named)


def short_place(span: Span) -> str:
    """The layer, or the site outside the layers, and the token."""
    where = code(span.site) if span.layer is None else f"layer {span.layer}"
    return where if span.token_text is None else f"{where}, {code(quoted(span.token_text))}"


def at_token(span: Span) -> str:
    """`, at token 29 '.'`, with the comma; nothing where the position is not known."""
    position = None if span.broke is None else span.broke.position
    if position is None:
        return ""
    return f", at token {position:,}" + ("" if span.token_text is None else f" {code(quoted(span.token_text))}")


def happened(span: Span, dtype: str) -> str:
    """What broke, with its numbers; to follow a place and a colon."""
    assert span.broke is not None
    broke = span.broke
    match broke.kind:
        case "overflow" if broke.value is None:
            return f"the value is past {number(broke.limit)}, where {dtype} ends"
        case "overflow":
            return f"the value is {number(broke.value)}, and {dtype} ends at {number(broke.limit)}"
        case "reduction":
            fits = "the result fits" if broke.value is None else f"the result, {number(broke.value)}, fits"
            return f"{fits}, but a partial sum on the way to it passes {number(broke.limit)}, where {dtype} ends"
        case "invalid":
            return f"the result is NaN although every operand is finite ({span.operator or 'an invalid operation'})"
        case "division-by-zero":
            return f"the result is infinite although every operand is finite ({span.operator or 'a division'})"
        case "masked-row":
            return "every key of a row is masked, and its softmax is 0 / 0"
        case "weight" | "input":
            source = listed([code(site) for site in broke.operand_sites], most=2) or f"an operand ({broke.kind})"
            return f"{source} was not finite to begin with"
        case "unresolved":
            return f"inf or NaN where {dtype} ends at {number(broke.limit)}; only recorded operators show how"
