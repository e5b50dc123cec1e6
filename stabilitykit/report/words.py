"""Sentences about where and how something broke."""

from stabilitykit.records.lengths import Span
from stabilitykit.words import code, listed, number, quoted


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
