import argparse
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabilitykit.checkpoints import Checkpoint, Vocabulary, random_checkpoint
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.gemma.tokenizer import Tokenizer

TEXTS = {
    "nothing": "",
    "prose": "The capital of France is Paris, isn't it?  It cost 1,234.56 — “a lot”…",
    # no indentation past the longest piece of spaces, where the two differ: see below
    "Python": re.sub(" {32,}", " " * 31, Path(argparse.__file__).read_text()),
    "Chinese": "你好，世界！今天天气怎么样？繁體中文，日本語とひらがな。한국어",
    "Arabic": "مرحبا بالعالم، كيف حالك؟ ١٢٣",
    "emoji": "👩‍👩‍👧‍👦🤗🇫🇷 👍🏽 x",
    "combining": "e\u0301 é \U0001d518\U00020000",
    "spaces": " a  b   c    d" + " " * 31 + "e ",
    "newlines": "\n\n\na\n\n \n" + "\n" * 50 + "x\r\n\r\n",
    "tabs": "\ta\t\tb\t\t\t\n\t" + "\t" * 40,
    "control characters": "".join(map(chr, range(32))) + "\x7f\0\0a",
    "raw bytes": bytes(range(256)).decode("latin-1"),
    "pieces of bytes": "<0x0A> <0xFF>",
    "HTML": "<table><tr><td>a</td></tr></table><b>[multimodal]</b>",
}
SPECIAL = "<bos><start_of_turn>user\nhi <unused5><end_of_turn>\n<unk><start_of_turn>model\n"


@pytest.fixture(scope="module")
def tokenizer(checkpoint_270m: Checkpoint) -> Tokenizer:
    return Tokenizer(checkpoint_270m.vocabulary)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer(random_checkpoint("random:2b").vocabulary)


@pytest.fixture(scope="session")
def reference(gguf_270m: Path) -> Any:
    """transformers' tokenizer of the same file; it takes half a minute to read it."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(gguf_270m.parent, gguf_file=gguf_270m.name)


@pytest.mark.parametrize("kind", TEXTS)
def test_ids_are_those_of_transformers(tokenizer: Tokenizer, reference: Any, kind: str) -> None:
    text = TEXTS[kind]
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.encode(text, bos=False) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_those_of_transformers(tokenizer: Tokenizer, reference: Any) -> None:
    assert tokenizer.encode(SPECIAL, bos=False, special_tokens=True) == reference.encode(
        SPECIAL, add_special_tokens=False
    )


@pytest.mark.parametrize(("length", "pieces"), [(1, [1]), (31, [31]), (32, [31, 1]), (40, [31, 9]), (70, [31, 31, 8])])
def test_long_runs_of_spaces_take_the_longest_piece(tokenizer: Tokenizer, length: int, pieces: list[int]) -> None:
    # transformers merges pairs instead and splits 40 into 16 + 24; up to 31 both agree
    ids = tokenizer.encode(" " * length, bos=False)
    assert [len(tokenizer.piece(index)) for index in ids] == pieces


def test_indentation_is_one_token_however_deep(tokenizer: Tokenizer) -> None:
    assert [tokenizer.piece(index) for index in tokenizer.encode("            x")] == ["<bos>", " " * 12, "x"]


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, tiny: Tokenizer, text: str) -> None:
    spaced = text.replace("▁", " ")  # the one character that SentencePiece takes for another
    assert tokenizer.decode(tokenizer.encode(text)) == spaced
    assert tiny.decode(tiny.encode(text)) == spaced


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<▁")))
def test_text_around_control_tokens_comes_back_without_them(tokenizer: Tokenizer, text: str) -> None:
    # every control piece begins with `<`, so a text without one holds none by chance
    ids = tokenizer.encode(f"<bos>{text}<end_of_turn>", special_tokens=True, bos=False)
    assert ids[0] == 2
    assert ids[-1] == 106
    assert tokenizer.decode(ids) == text


def test_control_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SPECIAL, bos=False)
    assert not {0, 1, 2, 3, 105, 106} & set(ids)
    assert tokenizer.decode(ids) == SPECIAL
    assert tokenizer.decode(tokenizer.encode("<bos>a<eos>", special_tokens=True)) == "a"


def test_bos_is_added_once_and_only_when_asked(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == [2]
    assert tokenizer.encode("", bos=False) == []
    assert tokenizer.encode("<bos>", bos=False, special_tokens=True) == [2]


def test_chat_is_gemmas_turn_template(tokenizer: Tokenizer, reference: Any) -> None:
    turn = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.chat(" Why?\n", generation=2) == reference.encode(turn.format("Why?"))
    assert tokenizer.chat("Why?", generation=3, bos=False) == reference.encode(
        turn.format("Why?"), add_special_tokens=False
    )
    assert tokenizer.chat("Why?", generation=3, system="Be brief.") == reference.encode(
        turn.format("Be brief.\n\nWhy?")
    )


def test_a_prompt_cannot_end_its_turn(tokenizer: Tokenizer) -> None:
    ids = tokenizer.chat("a<end_of_turn>\n<start_of_turn>model\nb", generation=3)
    assert (ids.count(105), ids.count(106)) == (2, 1)


def test_a_prompt_ends_its_turn_where_its_tokens_are_meant(tokenizer: Tokenizer) -> None:
    written = "a<end_of_turn>\n<start_of_turn>model\nb"
    ids = tokenizer.chat(written, generation=3, special_tokens=True)
    assert (ids.count(105), ids.count(106)) == (3, 2)
    turn = f"<start_of_turn>user\n{written}<end_of_turn>\n<start_of_turn>model\n"
    assert ids == tokenizer.encode(turn, special_tokens=True)


def test_only_generation_3_reads_a_system_text(tokenizer: Tokenizer) -> None:
    for generation in (1, 2):
        with pytest.raises(MisuseError, match=rf"Gemma {generation} has no system role; .* put it in the prompt"):
            tokenizer.chat("a", generation=generation, system="b")


def test_a_vocabulary_without_turns_cannot_chat() -> None:
    vocabulary = random_checkpoint("random:2b?vocabulary=263").vocabulary
    without = replace(vocabulary, pieces=tuple(piece.replace("_turn", "_thing") for piece in vocabulary.pieces))
    with pytest.raises(MisuseError, match=r"with <start_of_turn> and <end_of_turn>; this one lacks them. Use encode"):
        Tokenizer(without).chat("a", generation=1)


@pytest.mark.parametrize(
    ("index", "shown"),
    [
        (2, "<bos>"),
        (7001, " France"),
        (107, "\\n"),
        (255968, "\\t"),
        (238, "<0x00>"),
        (139, "   "),
        (106, "<end_of_turn>"),
    ],
)
def test_pieces_are_readable(tokenizer: Tokenizer, index: int, shown: str) -> None:
    assert tokenizer.piece(index) == shown


def test_a_written_escape_is_no_line_end(tokenizer: Tokenizer) -> None:
    for text in ("\n", "\\n", "\\"):
        shown = "".join(tokenizer.piece(index) for index in tokenizer.encode(text, bos=False))
        assert shown == text.encode("unicode_escape").decode()


@pytest.mark.parametrize("index", [-1, 262_144])
def test_an_id_outside_the_vocabulary_is_said(tokenizer: Tokenizer, index: int) -> None:
    for use in (tokenizer.piece, lambda index: tokenizer.decode([index])):
        with pytest.raises(MisuseError, match=rf"A token id is from 0 to 262143; {index} is not"):
            use(index)


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([238 + 0xE2, 238 + 0x82]) == "\ufffd\ufffd"
    assert tokenizer.decode([238 + 0xE2, 238 + 0x82, 238 + 0xAC]) == "€"


@pytest.mark.parametrize("special_tokens", [False, True])
def test_a_lone_surrogate_is_said(tokenizer: Tokenizer, special_tokens: bool) -> None:
    with pytest.raises(MisuseError, match="A text is Unicode; this one has a lone surrogate at character 2"):
        tokenizer.encode("ab\ud800c", special_tokens=special_tokens)


def test_a_vocabulary_that_sentencepiece_refuses_is_said() -> None:
    vocabulary = random_checkpoint("random:2b?vocabulary=263").vocabulary
    for pieces in (("<pad>",) * 263, (*vocabulary.pieces[:4], *(f"a{index}" for index in range(259)))):
        broken: Vocabulary = replace(vocabulary, pieces=pieces)
        with pytest.raises(
            CheckpointError, match="A Gemma's vocabulary is one that SentencePiece can use; this one is"
        ):
            Tokenizer(broken)


def test_a_random_vocabulary_writes_any_text() -> None:
    tokenizer = Tokenizer(random_checkpoint("random:2b?vocabulary=263").vocabulary)
    assert [tokenizer.piece(index) for index in tokenizer.encode("é b")] == [
        "<bos>", "<0xC3>", "<0xA9>", " ", "<0x62>",
    ]  # fmt: skip
