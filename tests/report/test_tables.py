import math

import pytest

from stabilitykit.report.blocks import Cell, Column, Table
from stabilitykit.report.tables import cell_text, csv_text, numeric_columns


def test_the_csv_of_an_empty_table_is_its_headings() -> None:
    assert csv_text(Table(name="t", title="", columns=[Column(name="a"), Column(name="b", unit="dB")], rows=[])) == (
        "a,b [dB]\n"
    )


def test_csv_keeps_every_digit_and_names_what_is_no_number(mixed: Table) -> None:
    assert csv_text(mixed) == (
        "text,length [tokens],headroom [bits],clean\n"
        "a|b,1000,0.25,true\n"
        "<bos>,12,,false\n"
        ",7,-3.0,\n"
        '"*two*\nlines",12,nan,true\n'
        "_x_ float8_e4m3fn,300,inf,true\n"
    )
    third = Table(name="t", title="", columns=[Column(name="x", format=str)], rows=[(1 / 3,), (-math.inf,)])
    assert csv_text(third) == "x\n0.3333333333333333\n-inf\n"


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (False, "no"),
        (12_345, "12,345"),
        (0.0012345678, "0.001235"),
        (68_398.4, "68,398"),
        (math.nan, "NaN"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        ("<bos>", "<bos>"),
    ],
)
def test_a_cell_is_written_for_a_reader(cell: Cell, text: str) -> None:
    assert cell_text(cell, Column(name="x")) == text


def test_the_columns_format_is_for_finite_numbers() -> None:
    column = Column(name="x", format=lambda value: f"{value:.1f}")
    assert [cell_text(cell, column) for cell in (0.25, 2, math.nan, None, "text")] == ["0.2", "2.0", "NaN", "–", "text"]


def test_numeric_columns_hold_numbers_and_gaps_only(mixed: Table) -> None:
    assert numeric_columns(mixed) == [False, True, True, False]
    assert numeric_columns(Table(name="t", title="", columns=[Column(name="x")], rows=[(None,)])) == [False]
