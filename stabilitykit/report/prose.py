"""The markup of prose, parsed once for every way of drawing it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    text: str
    bold: bool = False
    code: bool = False


def spans(text: str) -> Iterator[Span]:
    """Stretches of one look, in order. Stars inside `code` are code; a pair of stars left open is text.

    >>> [span.text for span in spans("so **`inf` · 0** is `nan`") if span.bold]
    ['inf', ' · 0']
    """
    pieces = re.split(r"(`[^`]+`|\*\*)", text)
    unpaired = _last(pieces, "**") if pieces.count("**") % 2 else None
    bold = False
    for index, piece in enumerate(pieces):
        if piece == "**" and index != unpaired:
            bold = not bold
        elif len(piece) > 2 and piece.startswith("`") and piece.endswith("`"):
            yield Span(piece[1:-1], bold, code=True)
        elif piece:
            yield Span(piece, bold)


def plain(text: str) -> str:
    """Text from elsewhere without what would be markup: tokens may be stars and backticks."""
    return text.replace("`", "'").replace("**", "∗∗")


def _last(pieces: list[str], wanted: str) -> int:
    return len(pieces) - 1 - pieces[::-1].index(wanted)
