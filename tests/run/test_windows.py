"""Texts that choose and texts that rank: windows of the same three kinds that share no token, and the user's own."""

from pathlib import Path

import pytest
from remedied import small

from stabilitykit.errors import MisuseError
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


def test_the_users_own_choose_with_bos_or_without(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("hi", encoding="utf-8")
    ids = tuple(TOKENIZER.encode("hi", bos=False))
    with_bos = texts(OPENED.config.context, TOKENIZER, [tmp_path / "mine.txt"])
    without = texts(OPENED.config.context, TOKENIZER, [tmp_path / "mine.txt"], bos=False)
    assert with_bos.choosing[-1] == (2, *ids)
    assert without.choosing[-1] == ids
    assert with_bos.held_out == without.held_out == texts(OPENED.config.context, TOKENIZER).held_out
    assert without.choosing[0][0] == 2  # the kit's own begin with it


def test_a_text_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a b " * (2 * OPENED.config.context), encoding="utf-8")
    with pytest.raises(
        MisuseError, match=r"long\.txt has [\d,]+ tokens, and the model's context holds [\d,]+; shorten it"
    ):
        texts(OPENED.config.context, TOKENIZER, [tmp_path / "long.txt"])
