"""Texts for repairs: those that choose a remedy's parameters, and others, never seen before, that rank it."""

from dataclasses import dataclass
from pathlib import Path

from stabilitykit.errors import MisuseError
from stabilitykit.run.prompts import Reads, around, parse_prompt, tokens

KINDS = ("prose", "code", "scripts")
WINDOW = 512  # tokens at most, what a text begins with among them
HELD_OUT = 3  # windows of each kind: 4,608 tokens in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Windows of tokens, each after what a text begins with, `<bos>` for most. No token of a held-out one stands in a
    choosing one.
    """

    choosing: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]


def texts(
    context: int,
    tokenizer: Reads,
    *,
    held_out: int | None = None,
) -> Texts:
    """Of each of `KINDS` the first window chooses and the next ones are held out: three, or as many as have `held_out`
    tokens, a third of each kind. No window is longer than the `context`.

    Raises MisuseError for fewer than a token of each kind.
    """
    begin, _ = around(tokenizer)
    length = min(WINDOW, context)
    own = length - len(begin)  # tokens of the text in a window
    lengths = [length] * HELD_OUT if held_out is None else _lengths(held_out // len(KINDS), length, len(begin) + 1)
    if not lengths:
        least = len(KINDS) * (len(begin) + 1)
        raise MisuseError(f"Three texts are ranked on, and take at least {least} tokens; {held_out} are fewer.")
    choosing, held = [], []
    for kind in KINDS:
        prompt = parse_prompt(kind, Path())
        ids = tokens(prompt, tokenizer, bos=False, length=own + sum(one - len(begin) for one in lengths))
        choosing.append((*begin, *ids[:own]))
        at = own
        for one in lengths:
            held.append((*begin, *ids[at : at + one - len(begin)]))
            at += one - len(begin)
    return Texts(choosing=tuple(choosing), held_out=tuple(held))


def _lengths(total: int, longest: int, least: int) -> list[int]:
    """`total` tokens in as few windows as possible, all but the last of them full; fewer than `least` are left out."""
    full, rest = divmod(total, longest)
    return [longest] * full + ([rest] if rest >= least else [])
