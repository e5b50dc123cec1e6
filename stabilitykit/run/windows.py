"""Texts for repairs: those that choose a remedy's parameters, and others, never seen before, that rank it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stabilitykit.checkpoints import GemmaConfig
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.run.prompts import parse_prompt, tokens

KINDS = ("prose", "code", "scripts")
WINDOW = 512  # tokens, `<bos>` among them
HELD_OUT = 3  # windows of each kind: 4,608 tokens in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Windows of tokens, each after `<bos>`. No token of a held-out one stands in a choosing one."""

    choosing: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]


def texts(config: GemmaConfig, tokenizer: Tokenizer, files: Sequence[Path] = (), *, bos: bool = True) -> Texts:
    """Of each of `KINDS` the first window chooses and the next ones are held out; the user's `files` choose too, after
    `<bos>` or without it.

    Raises MisuseError for a file that cannot be read, or that has no text.
    """
    length = min(WINDOW, config.context)
    choosing, held_out = [], []
    for kind in KINDS:
        prompt = parse_prompt(kind, Path())
        first, *ids = tokens(prompt, tokenizer, bos=True, length=1 + (length - 1) * (HELD_OUT + 1))
        windows = [(first, *ids[start : start + length - 1]) for start in range(0, len(ids), length - 1)]
        choosing.append(windows[0])
        held_out += windows[1:]
    for file in files:
        prompt = parse_prompt(f"@{file.absolute()}", Path())
        found = tokens(prompt, tokenizer, bos=bos, length=None)
        if len(found) > config.context:
            raise MisuseError(
                f"{file} has {len(found):,} tokens, and the model's context holds {config.context:,}; shorten it."
            )
        choosing.append(tuple(found))
    return Texts(choosing=tuple(choosing), held_out=tuple(held_out))
