"""How numbers, counts, lists and tokens are written, wherever they are written."""

from collections.abc import Callable, Sequence
from typing import Protocol


def number(value: float | None) -> str:
    """For reading: thousands with separators, small numbers with four digits."""
    if value is None:
        return "a value that could not be recomputed"
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 token` · `2 tokens`; `many` where an s will not do."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def count(amount: int, one: str, many: str | None = None) -> str:
    """`1 case` · `12 cases` · `no cases`; `many` where an s will not do."""
    return counted(amount, one, many) if amount else f"no {many or one + 's'}"


def none_finished(amount: int, one: str, which: str = "") -> str:
    """`the only case has not finished` · `none of 12 cases has finished`; `which` of them follows the noun."""
    if amount == 1:
        return f"the only {one}{which} has not finished"
    return f"none of {count(amount, one)}{which} has finished"


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


class Placed(Protocol):
    """What has a place in a model: a record, a break, a bound."""

    @property
    def layer(self) -> int | None: ...
    @property
    def label(self) -> str | None: ...
    @property
    def site(self) -> str | None: ...


def place(found: Placed) -> str:
    """`layer 7, residual after MLP`; the site where it has no label."""
    named = found.label or found.site or ""
    return named if found.layer is None else f"layer {found.layer}, {named}"


def place_and_site(found: Placed) -> str:
    """`layer 7, residual after MLP (layers.7)`; the site once where it has no label."""
    return place(found) if found.label in (None, found.site) else f"{place(found)} ({found.site})"


def at_token(position: int | None, text: str | None, show: Callable[[str], str] | None = None) -> str:
    """`, at token 29 '.'`, to follow a place; nothing where the position is not known."""
    if position is None:
        return ""
    return f", at token {position:,}" + (f" {(show or quoted)(text)}" if text else "")


def with_bos(bos: bool | None, mark: str = "`") -> str:
    """`with <bos>` or `without <bos>`; nothing where it is not known."""
    return "" if bos is None else f"{'with' if bos else 'without'} {mark}<bos>{mark}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th ... 11th, 12th, 13th ... 21st."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def grouped(value: float) -> str:
    """12,345"""
    return f"{value:,.0f}"


def printable(text: str) -> str:
    """A token's text as a piece: a line's end is a backslash and an n, and a backslash two of them."""
    return escaped(text.replace("\\", "\\\\"))


def quoted(piece: str) -> str:
    """A piece between quotes. Its backslashes stand for what they stood for; repr would double them."""
    shown = escaped(piece)
    return f'"{shown}"' if "'" in shown and '"' not in shown else f"'{shown}'"


def escaped(text: str) -> str:
    """What no terminal shows, as Python would write it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
