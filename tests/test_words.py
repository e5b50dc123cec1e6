"""How numbers, counts, lists and tokens are written."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabilitykit.words import (
    code,
    count,
    counted,
    escaped,
    grouped,
    listed,
    number,
    ordinal,
    printable,
    quoted,
    sentence,
    with_bos,
)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0"), (999.96, "1000"), (0.123456, "0.1235"), (1000, "1,000"), (65_504.0, "65,504"), (-68_384, "-68,384"),
        (1e9, "1e+09"), (3.4e38, "3.4e+38"), (float("inf"), "inf"), (float("nan"), "nan"),
        (None, "a value that could not be recomputed"),
    ],
)  # fmt: skip
def test_numbers_have_four_digits_or_separators(value: float | None, written: str) -> None:
    assert number(value) == written


def test_counts_agree_with_their_noun() -> None:
    assert [counted(amount, "token") for amount in (0, 1, 2, 1234)] == [
        "0 tokens",
        "1 token",
        "2 tokens",
        "1,234 tokens",
    ]
    assert [count(amount, "case") for amount in (0, 1, 12)] == ["no cases", "1 case", "12 cases"]
    assert [count(amount, "family", "families") for amount in (0, 1, 2)] == ["no families", "1 family", "2 families"]


def test_lists_end_in_and_or_in_how_many_more_there_are() -> None:
    assert [listed("abc"[:length]) for length in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert [listed("abcde"[:length], 2) for length in (2, 3, 4, 5)] == [
        "a and b", "a, b and c", "a, b and 2 more", "a, b and 3 more",
    ]  # fmt: skip
    assert listed(["x"] * 2002, 1) == "x and 2,001 more"


def test_ordinals() -> None:
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111, 113, 123)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th", "113th", "123rd",
    ]  # fmt: skip


def test_small_words() -> None:
    assert grouped(12_345.4) == "12,345"
    assert code("a`b") == "`a'b`"
    assert [sentence(text) for text in ("an error ", "Why?", "é.", "")] == ["An error.", "Why?", "É.", "."]
    assert [with_bos(bos, mark) for bos, mark in ((True, "`"), (False, ""), (None, "`"))] == [
        "with `<bos>`", "without <bos>", "",
    ]  # fmt: skip


@given(st.text())
def test_what_is_shown_is_printable_and_nothing_is_lost(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert escaped(shown) == shown
    quote = "'''" if '"' in shown else '"""'
    if "'" not in shown or '"' not in shown:
        assert ast.literal_eval(f"{quote}{shown}{quote}") == text


@given(st.text(st.characters(exclude_characters="\\")))
def test_quotes_are_ones_that_the_piece_does_not_hold_where_there_are_such(piece: str) -> None:
    shown = quoted(piece)
    assert shown.isprintable()
    assert shown[0] == shown[-1] == ('"' if "'" in piece and '"' not in piece else "'")
    if "'" not in piece or '"' not in piece:
        assert ast.literal_eval(shown) == piece
