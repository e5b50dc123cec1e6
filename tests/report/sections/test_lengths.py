"""Length by dtype: the tables number by number, the figures by where things are drawn."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from swept import broken_map, broken_run, check, clean_map, lengths_case, run_case, sweep

from stabilitykit.records.lengths import LengthMap, Span
from stabilitykit.report.blocks import Figure, Prose, Section, Table
from stabilitykit.report.figures import draw
from stabilitykit.report.sections.lengths import section


def made(folder: Path, *pairs: Any) -> Section:
    return section(sweep(folder / "toy", pairs))


def tables(found: Section) -> dict[str, Table]:
    return {block.name: block for block in found.blocks if isinstance(block, Table)}


def figures(found: Section) -> dict[str, Figure]:
    return {block.name: block for block in found.blocks if isinstance(block, Figure)}


def prose(found: Section) -> str:
    return " ".join(block.text for block in found.blocks if isinstance(block, Prose))


def a_sweep(folder: Path) -> Section:
    return made(
        folder,
        (lengths_case(bos=False), broken_map(checks=(check(),))),
        (lengths_case("float32", bos=False), clean_map("float32", amax=131008.0)),
        (run_case(), broken_run()),
    )


def test_each_case_has_its_first_break_and_the_headroom_before_it(tmp_path: Path) -> None:
    found = tables(a_sweep(tmp_path))
    low, reference = found["first-breaks"].rows
    assert list(low) == ["prose", False, "float16", 64, 29, "layers.1", "'.'", 70000.0, 1.0, 2, "1 of 1", 1.0]
    assert list(reference[:8]) == ["prose", False, "float32", 64, None, None, None, None]
    assert reference[9:] == [1, None, None]
    assert [(row[3], row[4], row[5]) for row in found["spans"].rows] == [
        (1, 28, None),
        (29, 64, "layers.1"),
        (1, 64, None),
    ]
    (run,) = map(list, found["runs"].rows)
    assert run[:7] == ["prose", True, "float16", 3, "layers.0", "'<bos>'", 68000.0]
    assert run[7:] == [pytest.approx(-0.054, abs=1e-3), "no `probabilities`"]


def test_checks_that_agree_and_ones_that_do_not_are_both_said(tmp_path: Path) -> None:
    assert prose(a_sweep(tmp_path)) == (
        "128 lengths in 2 cases come from 3 forward passes. 1 length was run again directly and agrees: the same first "
        "break, and peaks within 1 ulp."
    )
    apart = made(tmp_path / "apart", (lengths_case(), clean_map(checks=(check(), check(32, agrees=False)))))
    assert "**1 of 2 lengths run again directly disagrees**: `prose` at 32 tokens." in prose(apart)
    assert [row[6] for row in tables(apart)["length-checks"].rows] == [True, False]
    unchecked = made(tmp_path / "unchecked", (lengths_case(), clean_map()))
    assert "None was run again directly" in prose(unchecked)
    assert "length-checks" not in tables(unchecked)


def test_undecided_lengths_are_named(tmp_path: Path) -> None:
    spans = (Span(first=1, last=9, run=64), Span(first=10, last=64, run=64, near=True))
    found = made(tmp_path, (lengths_case(), LengthMap(clean_map().header, spans, clean_map().peaks)))
    assert "within eight ulp of the limit: `prose` at 10 to 64 tokens." in prose(found)
    assert [row[-1] for row in tables(found)["spans"].rows] == [False, True]


def drawn_lines(canvas: Any) -> list[list[list[float]]]:
    """The points of each line of the first panel, but for the one at the maximum, which spans it."""
    drawn = [np.asarray(line.get_data()) for line in canvas.axes[0].get_lines()]
    return [points.T.tolist() for points in drawn if points[0][0] != 0]


def test_the_curve_is_float16s_headroom_of_the_widest_dtype_and_marks_the_value_that_broke(tmp_path: Path) -> None:
    canvas = Canvas()
    figures(a_sweep(tmp_path))["headroom-by-length"].draw(canvas)
    room = pytest.approx(-0.0958, abs=1e-4)
    curve, thin, mark = drawn_lines(canvas)
    assert curve == [[1, 0.0], [5, -1.0], [64, -1.0]]
    assert thin[0] == [29, room]
    assert mark == [[29, room]]
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == [
        "without <bos> (float32)",
        "first break in float16",
    ]


def test_a_text_that_breaks_from_its_first_token_on_has_a_line_at_what_broke(tmp_path: Path) -> None:
    """Its one dtype has no curve: nothing is known of it but the value that did not fit, at every length."""
    canvas = Canvas()
    figures(made(tmp_path, (lengths_case(), broken_map(first=1))))["headroom-by-length"].draw(canvas)
    room = math.log2(65504 / 70000)
    line, mark = drawn_lines(canvas)
    assert ([x for x, _ in line], [x for x, _ in mark]) == ([1, 64], [1])
    assert [y for _, y in line + mark] == pytest.approx([room] * 3)
    low, high = canvas.axes[0].get_ylim()
    assert low < room < 0 < high


def test_the_curve_is_that_of_the_dtype_of_the_largest_range(tmp_path: Path) -> None:
    """float16 is finer than bfloat16, and its curve ends where it breaks."""
    canvas = Canvas()
    found = made(
        tmp_path, (lengths_case(), broken_map()), (lengths_case("bfloat16"), clean_map("bfloat16", amax=131008.0))
    )
    figures(found)["headroom-by-length"].draw(canvas)
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == [
        "with <bos> (bfloat16)",
        "first break in float16",
    ]
    assert min(float(y) for line in canvas.axes[0].get_lines() for y in np.asarray(line.get_ydata())) == -1.0


def test_the_map_says_every_stretch_on_hover(tmp_path: Path) -> None:
    found = figures(a_sweep(tmp_path))["first-break"]
    texts = {hover.text for hover in found.draw(Canvas())}
    assert texts == {
        "prose, 1 to 28 tokens: clean",
        "prose, 29 to 64 tokens: breaks in layers.1, at token 28 '.'",
        "prose, 1 to 64 tokens: clean",
        "prose, 3 tokens: breaks in layers.0, at token 0 '<bos>'",
    }
    assert "prose without <bos> in float16 from 29" in found.alt


def test_one_run_is_enough_for_a_section_and_so_is_one_token(tmp_path: Path) -> None:
    one = made(tmp_path, (run_case(), broken_run()))
    assert "only the lengths of single runs are known" in prose(one)
    assert set(figures(one)) == {"first-break"}
    short = made(tmp_path / "short", (lengths_case(), clean_map(longest=1)))
    assert set(figures(short)) == {"first-break"}
    for found in (one, short):
        assert draw(figures(found)["first-break"]).png


def test_an_empty_sweep_says_what_is_missing(tmp_path: Path) -> None:
    found = made(tmp_path, (lengths_case(), None))
    assert found.opening == "No case that runs a prompt has finished: no length is known."
    assert not found.blocks


def test_the_longest_clean_length_counts_where_breaks_come_and_go(tmp_path: Path) -> None:
    broken = broken_map().spans[-1]
    spans = (
        Span(first=1, last=4, run=64),
        replace(broken, first=5, last=5),
        Span(first=6, last=64, run=64),
    )
    found = made(tmp_path, (lengths_case(), LengthMap(clean_map().header, spans, clean_map(amax=16376.0).peaks)))
    assert list(tables(found)["first-breaks"].rows[0][3:9]) == [64, 5, "layers.1", "'.'", 70000.0, 2.0]


def test_with_and_without_bos_are_told_apart(tmp_path: Path) -> None:
    found = made(tmp_path, (lengths_case(), clean_map()), (lengths_case(bos=False), clean_map()))
    canvas = Canvas()
    figures(found)["headroom-by-length"].draw(canvas)
    curves = [line for line in canvas.axes[0].get_lines() if np.size(line.get_xdata()) > 2]
    assert len({line.get_color() for line in curves}) == len({line.get_linestyle() for line in curves}) == 2
