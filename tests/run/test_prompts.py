"""Prompts of an exact length: shorter is a prefix of longer, and what makes no sense is refused in a sentence."""

import hashlib
import math
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabilitykit.checkpoints import Checkpoint, open_checkpoint
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.run.prompts import DIGITS, KINDS, parse_prompt, pi_digits, tokens

BOS = 2
LONG = [name for name, kind in KINDS.items() if kind.alone is not None]


@pytest.fixture(scope="module")
def tokenizer(checkpoint_270m: Checkpoint) -> Tokenizer:
    return Tokenizer(checkpoint_270m.vocabulary)


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Tokenizer:
    """A vocabulary in which ASCII characters and bytes are tokens: needs no real weights."""
    return Tokenizer(open_checkpoint("random:gemma3-270m?vocabulary=400&layers=1").vocabulary)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", LONG)
def test_every_text_reaches_its_lengths_and_each_is_a_prefix_of_the_next(
    name: str, bos: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prompt = parse_prompt(name, tmp_path)
    longest = tokens(prompt, tokenizer, bos=bos, length=6000)
    assert len(longest) == 6000
    assert (longest[0] == BOS) is bos
    assert BOS not in longest[1:]
    for length in (1, 2, 3, 64, 1000, 5999):
        assert tokens(prompt, tokenizer, bos=bos, length=length) == longest[:length]


@pytest.mark.parametrize("name", [*LONG, "word: attention"])
def test_bos_counts_and_changes_nothing_else(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompt = parse_prompt(name, tmp_path)
    assert tokens(prompt, tokenizer, bos=True, length=2) == [BOS, *tokens(prompt, tokenizer, bos=False, length=1)]


def test_without_a_length_a_text_is_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("prose", "word: attention", "repeat"):
        prompt = parse_prompt(name, tmp_path)
        assert tokens(prompt, tokenizer, bos=False, length=None) == tokenizer.encode(prompt.text, bos=False)


@pytest.mark.parametrize("name", LONG)
def test_the_digest_is_that_of_the_text_and_the_text_the_same_each_time(name: str, tmp_path: Path) -> None:
    prompt = parse_prompt(name, tmp_path)
    assert prompt.sha256 == hashlib.sha256(prompt.text.encode()).hexdigest()
    assert prompt == parse_prompt(name, Path("elsewhere"))


def test_prose_begins_and_ends_with_the_book_and_carries_nothing_of_a_publisher(tmp_path: Path) -> None:
    text = parse_prompt("prose", tmp_path).text
    assert text.startswith("It is a truth universally acknowledged, that a single man in possession of a good fortune,")
    assert text.endswith("Colonel Forster was going to be married.\n")
    assert not any(word in text.lower() for word in ("gutenberg", "copyright", "chapter", "ebook", "_"))


def test_scripts_are_many_and_all_of_them_come_early(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompt = parse_prompt("scripts", tmp_path)
    early = tokenizer.decode(tokens(prompt, tokenizer, bos=False, length=1024))
    scripts = {unicodedata.name(c).split()[0] for c in early if c.isalpha()}
    expected = "LATIN CYRILLIC GREEK ARABIC HEBREW DEVANAGARI TAMIL THAI CJK HIRAGANA HANGUL ARMENIAN GEORGIAN ETHIOPIC"
    assert scripts >= set(expected.split())


def test_code_is_source_that_compiles(tmp_path: Path) -> None:
    compile(parse_prompt("code", tmp_path).text, "argparse", "exec")


def test_digits_of_pi_agree_with_math_and_with_another_formula() -> None:
    assert float(pi_digits(20)) == math.pi
    assert pi_digits(5000) == _pi_by_gauss(5000)


def test_digits_do_not_depend_on_how_many_are_asked_for() -> None:
    longest = pi_digits(3000)
    for count in (1, 2, 9, 10, 767, 2999):  # 762 to 767 are all nines: a digit rounded up would carry far
        assert pi_digits(count) == longest[: count + 2]


def test_a_digit_is_a_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    digits = parse_prompt("digits", tmp_path)
    assert len(digits.text) == DIGITS
    assert len(tokens(digits, tokenizer, bos=False, length=None)) == DIGITS


def test_repeat_is_one_token_as_often_as_asked_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (the,) = tokenizer.encode(" the", bos=False)
    (plain,) = tokenizer.encode("the", bos=False)
    assert tokens(parse_prompt("repeat", tmp_path), tokenizer, bos=True, length=5) == [BOS, the, the, the, the]
    assert tokens(parse_prompt("repeat:  the", tmp_path), tokenizer, bos=False, length=3) == [the] * 3
    assert tokens(parse_prompt("repeat: the", tmp_path), tokenizer, bos=False, length=3) == [plain] * 3
    assert tokens(parse_prompt("repeat", tmp_path), tokenizer, bos=True, length=1) == [BOS]


def test_repeating_more_than_one_token_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompt = parse_prompt("repeat: hello world", tmp_path)
    with pytest.raises(MisuseError, match=r"is one token .* 'hello world' is 2, beginning with 'hello', ' world'"):
        tokens(prompt, tokenizer, bos=True, length=8)


def test_a_word_keeps_the_space_before_it_and_is_one_word(tmp_path: Path) -> None:
    assert parse_prompt("word: attention", tmp_path).text == "attention"
    assert parse_prompt("word:attention", tmp_path).text == "attention"
    assert parse_prompt("word:  attention", tmp_path).text == " attention"
    with pytest.raises(MisuseError, match="is one word; 'two words' is not"):
        parse_prompt("word: two words", tmp_path)
    with pytest.raises(MisuseError, match="is one word; '' is not"):
        parse_prompt("word: ", tmp_path)


def test_a_text_too_short_is_not_drawn_out(bytes_tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompt = parse_prompt("word: seven", tmp_path)
    assert len(tokens(prompt, bytes_tokenizer, bos=True, length=6)) == 6
    with pytest.raises(MisuseError, match=r"'word: seven' has 6 tokens with <bos>, and 7 were asked for"):
        tokens(prompt, bytes_tokenizer, bos=True, length=7)
    with pytest.raises(MisuseError, match=r"'word: a' has 1 token without <bos>, and 2 were asked for"):
        tokens(parse_prompt("word: a", tmp_path), bytes_tokenizer, bos=False, length=2)
    with pytest.raises(MisuseError, match=r"'word: seven' has 5 tokens without <bos>, and 6 were asked for"):
        tokens(prompt, bytes_tokenizer, bos=False, length=6)


@pytest.mark.parametrize("length", [0, -1])
def test_a_length_is_at_least_one(length: int, bytes_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=f"at least 1 token; {length} is not"):
        tokens(parse_prompt("prose", tmp_path), bytes_tokenizer, bos=True, length=length)


def test_a_file_is_found_beside_the_experiment_and_kept_as_it_is(bytes_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("  Zwölf Boxkämpfer\n\n", encoding="utf-8")
    for name in ("@notes.txt", f"@{path}"):
        prompt = parse_prompt(name, tmp_path if name == "@notes.txt" else Path("elsewhere"))
        assert prompt.name == name
        assert prompt.text == "  Zwölf Boxkämpfer\n\n"
        ids = tokens(prompt, bytes_tokenizer, bos=False, length=None)
        assert bytes_tokenizer.decode(ids) == prompt.text


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(MisuseError, match=r"names a file to read; .*missing\.txt is none \(No such file"):
        parse_prompt("@missing.txt", tmp_path)
    with pytest.raises(MisuseError, match=r"names a file to read; .* is none \(Is a directory"):
        parse_prompt("@", tmp_path)
    with pytest.raises(MisuseError, match=r"names a file to read; .* is none \(embedded null"):
        parse_prompt("@a\0b", tmp_path)
    with pytest.raises(MisuseError, match=r"is UTF-8 text; byte 3 of .*latin\.txt is not"):
        parse_prompt("@latin.txt", tmp_path)
    with pytest.raises(MisuseError, match=r"at least one character; '@empty\.txt' has none"):
        parse_prompt("@empty.txt", tmp_path)


@pytest.mark.parametrize("name", ["", "Prose", "prose ", "prose: x", "prose:", "word", ": x", "novel: x"])
def test_an_unknown_prompt_lists_what_is_allowed(name: str, tmp_path: Path) -> None:
    with pytest.raises(MisuseError) as caught:
        parse_prompt(name, tmp_path)
    message = str(caught.value)
    assert f"Unknown prompt {name!r}; choose one of: " in message
    assert '"@FILE"' in message
    for kind_name, kind in KINDS.items():
        assert (f'"{kind_name}"' in message) is (kind.alone is not None)
        assert (f'"{kind_name}: TEXT"' in message) is (kind.given is not None)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=[]), max_size=30))
def test_any_name_is_understood_or_refused_by_the_kit(name: str) -> None:
    for candidate in (name, f"word: {name}", f"repeat: {name}"):
        if candidate.startswith("@"):
            continue
        with suppress(MisuseError):  # and no other exception
            assert parse_prompt(candidate, Path()).text


def _pi_by_gauss(count: int) -> str:
    """Gauss: π = 48 arctan(1/18) + 32 arctan(1/57) - 20 arctan(1/239), each arctan by Euler's series."""
    one = 10 ** (count + 10)

    def arctan(x: int) -> int:
        term = total = one * x // (x * x + 1)
        n = 1
        while term:
            term = term * 2 * n // ((2 * n + 1) * (x * x + 1))
            total += term
            n += 1
        return total

    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        digits = str((48 * arctan(18) + 32 * arctan(57) - 20 * arctan(239)) // 10**10)
    finally:
        sys.set_int_max_str_digits(limit)
    return f"{digits[0]}.{digits[1:]}"
