"""Which tokens a file can hold, and what kind of thing a token is."""

from dataclasses import replace
from pathlib import Path

import pytest
from remedied import SPECS

from stabilitykit.checkpoints import Vocabulary
from stabilitykit.checkpoints.checkpoint import PieceType
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.records.search import KINDS
from stabilitykit.run.prompts import read_text
from stabilitykit.searches.kinds import kind_of
from stabilitykit.searches.text import text_of

VOCABULARY = random_checkpoint(SPECS[1]).vocabulary
BYTE = 4  # the token of byte 0


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([263], "!"),
        ([262, 263], " !"),
        ([BYTE + 0x0A, 263], "\n!"),
        ([BYTE + 0xC3, BYTE + 0xA9], "é"),
        ([BYTE + 0xC3], None),  # half a letter
        ([BYTE + 0x0D], None),  # a file's reader makes a newline of it
        ([BYTE + 0x21], None),  # which has a token of its own
        ([2], None),
        ([263, 2], None),
        ([511], None),
    ],
)
def test_a_text_is_read_as_its_tokens_or_there_is_none(tokens: list[int], text: str | None, tmp_path: Path) -> None:
    tokenizer = Tokenizer(VOCABULARY)
    assert text_of(tokenizer, tokens) == text
    if text is not None:
        (tmp_path / "prompt.txt").write_bytes(text.encode())
        assert tokenizer.encode(read_text(tmp_path / "prompt.txt"), bos=False) == tokens


def test_each_token_is_of_one_kind() -> None:
    pieces = {
        "<bos>": "control", "<unused7>": "unused", "<0x0A>": "byte", "\n\n": "newline", "▁": "space", "▁▁\t": "space",
        "▁the": "word", "é": "word", "7": "digit", ".": "punctuation", '▁"': "punctuation", "€": "punctuation",
        "</h4>": "other", ".\n": "other",
    }  # fmt: skip
    types: dict[str, PieceType] = {"control": "control", "byte": "byte"}
    vocabulary = replace(
        VOCABULARY,
        pieces=tuple(pieces),
        types=tuple(types.get(kind, "user_defined") for kind in pieces.values()),
        scores=(0.0,) * len(pieces),
    )
    assert isinstance(vocabulary, Vocabulary)
    assert [kind_of(vocabulary, token) for token in range(len(pieces))] == list(pieces.values())
    assert set(pieces.values()) == set(KINDS)
