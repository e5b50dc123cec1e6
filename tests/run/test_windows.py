"""Texts that choose and texts that rank: windows of the same three kinds that share no token."""

from pathlib import Path

from remedied import small

from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.run.prompts import parse_prompt, tokens
from stabilitykit.run.windows import HELD_OUT, KINDS, WINDOW, texts

OPENED = small(3)
TOKENIZER = Tokenizer(OPENED.vocabulary)


def test_no_token_that_ranks_has_chosen() -> None:
    found = texts(OPENED.config.context, TOKENIZER)
    assert (len(found.choosing), len(found.held_out)) == (len(KINDS), HELD_OUT * len(KINDS))
    assert sum(map(len, found.held_out)) == 4608
    assert {window[0] for window in (*found.choosing, *found.held_out)} == {2}
    for number, kind in enumerate(KINDS):
        whole = tokens(parse_prompt(kind, Path()), TOKENIZER, bos=False, length=(WINDOW - 1) * (HELD_OUT + 1))
        windows = (found.choosing[number], *found.held_out[HELD_OUT * number : HELD_OUT * (number + 1)])
        assert [token for window in windows for token in window[1:]] == whole  # one after the other
