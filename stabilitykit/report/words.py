"""Sentences about where and how something broke."""

from collections.abc import Sequence

from stabilitykit.records.lengths import Span
from stabilitykit.words import at_token, code, listed, number, quoted

_CHANGES = 4  # of the place of a text's first break, in one sentence


def located(span: Span) -> str:
    """Where it broke: the layer, the name for people, the site."""
    layer = [] if span.layer is None else [f"layer {span.layer}"]
    named = [f"{span.label} ({code(span.site)})" if span.label else code(span.site)]
    return ", ".join(layer + named)


def short_place(span: Span) -> str:
    """The layer, or the site outside the layers, and the token."""
    where = _layer(span)
    return where if span.token_text is None else f"{where}, {code(quoted(span.token_text))}"


def layers_by_length(spans: Sequence[Span]) -> str:
    """Where the longer ones of some broken lengths break, if elsewhere: `layer 9 from 520 tokens, layer 8 from 2,087`.

    Empty where all break in the same layer or, outside the layers, at the same site. `spans` ascend.
    """
    changes: list[tuple[str, int]] = []
    known = _layer(spans[0])
    for span in spans[1:]:
        if _layer(span) != known:
            known = _layer(span)
            changes.append((known, span.first))
    said = [f"{where} from {length:,}{' tokens' if turn == 0 else ''}" for turn, (where, length) in enumerate(changes)]
    more = [f"and {len(said) - _CHANGES} more changes"] if len(said) > _CHANGES + 1 else said[_CHANGES:]
    return ", ".join([*said[:_CHANGES], *more])


def _layer(span: Span) -> str:
    return code(span.site) if span.layer is None else f"layer {span.layer}"


def at_broken_token(span: Span) -> str:
    """`, at token 29 '.'`, with the comma; nothing where the position is not known."""
    position = None if span.broke is None else span.broke.position
    return at_token(position, span.token_text, show=lambda text: code(quoted(text)))


def happened(span: Span, dtype: str) -> str:
    """What broke, with its numbers; to follow a place and a colon."""
    assert span.broke is not None
    broke = span.broke
    maximum = f"the {dtype} maximum, {number(broke.limit)}"
    match broke.kind:
        case "overflow" if broke.value is None:
            return f"the value exceeds {maximum}"
        case "overflow":
            return f"{number(broke.value)} exceeds {maximum}"
        case "reduction":
            fits = "the result fits" if broke.value is None else f"the result, {number(broke.value)}, fits"
            return f"{fits}, but a partial sum on the way to it exceeds {maximum}"
        case "invalid" | "division-by-zero" if broke.rounded_site is not None:
            lost = "NaN" if broke.kind == "invalid" else "infinite"
            return f"the result is {lost}, for {dtype} rounds {code(broke.rounded_site)} to 0"
        case "invalid":
            return f"the result is NaN although every operand is finite ({span.operator or 'an invalid operation'})"
        case "division-by-zero":
            return f"the result is infinite although every operand is finite ({span.operator or 'a division'})"
        case "masked-row" if broke.rounded_site is not None:
            return (
                f"score and mask add up to less than the {dtype} minimum in {code(broke.rounded_site)} and become "
                "-inf, and the softmax of a row of -inf is 0 / 0"
            )
        case "masked-row":
            return "every key of a row is masked, and its softmax is 0 / 0"
        case "weight" | "input" | "constant":
            names = [broke.origin_name] if broke.origin_name else list(broke.operand_sites)
            source = listed([code(site) for site in names], most=2) or f"an operand ({broke.kind})"
            if broke.kind == "constant":
                return f"the code itself puts NaN or an infinity there ({span.operator or source})"
            return f"{source} {'were' if len(names) > 1 else 'was'} not finite to begin with"
        case "unresolved":
            return f"inf or NaN; {maximum}. Only a recording of operators shows how it arose"
