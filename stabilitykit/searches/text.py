"""Which tokens a prompt's file can hold: those that come back from their own text."""

from collections.abc import Sequence

from stabilitykit.models.gemma.tokenizer import Tokenizer


def text_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str | None:
    """The text that is read as `tokens`, without `<bos>`; None where there is none.

    Text is read as a prompt's file is: control tokens in it are letters, bytes have to be UTF-8, and a carriage return
    would become a newline.
    """
    text = tokenizer.decode(tokens)
    if not text or "\r" in text:
        return None
    return text if tokenizer.encode(text, bos=False) == list(tokens) else None
