"""Which tokens a prompt's file can hold: those that their own text tokenizes to."""

from collections.abc import Sequence
from typing import Protocol

from stabilitykit.run.prompts import Reads


class ReadsBack(Reads, Protocol):
    """A tokenizer that also writes what it reads."""

    def decode(self, ids: Sequence[int]) -> str: ...


def text_of(tokenizer: ReadsBack, tokens: Sequence[int]) -> str | None:
    """The text that tokenizes to `tokens`, without `<bos>`; None where there is none.

    Text is read as from a prompt's file: control tokens in it are plain characters, bytes must be UTF-8, and a carriage
    return would become a newline.
    """
    text = tokenizer.decode(tokens)
    if not text or "\r" in text:
        return None
    return text if tokenizer.encode(text, bos=False) == list(tokens) else None
