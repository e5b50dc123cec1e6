"""The verdict, compared whole: it must be right for any model and any sweep."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from swept import (
    broke,
    broken_map,
    broken_run,
    clean_map,
    clean_run,
    lengths_case,
    memory_case,
    run_case,
    sweep,
)

from stabilitykit.records.lengths import LengthMap, Span
from stabilitykit.records.sweep import Failure
from stabilitykit.report.blocks import Prose, Section, Table
from stabilitykit.report.sections.verdict import section


def made(folder: Path, *pairs: Any) -> Section:
    return section(sweep(folder / "toy", pairs))


def paragraph(found: Section) -> str:
    block = found.blocks[0]
    assert isinstance(block, Prose)
    return block.text


def table(found: Section) -> Table:
    block = found.blocks[1]
    assert isinstance(block, Table)
    return block


FIRST = (
    "**float16 breaks in layer 1, residual after MLP (`layers.1`), at token 28 `'.'`**, in `prose` {} `<bos>` at 29 "
    "tokens, the shortest that breaks: 70,000 exceeds the float16 maximum, 65,504."
)


def test_a_break_at_some_lengths_of_some_texts_says_which_and_what_to_do(tmp_path: Path) -> None:
    found = made(
        tmp_path,
        (lengths_case(bos=True), broken_map(first=1)),
        (lengths_case(prompt="code"), broken_map(first=1)),
        (lengths_case(bos=False), broken_map()),
        (lengths_case(prompt="code", bos=False), clean_map()),
        (lengths_case("bfloat16"), clean_map("bfloat16")),
        (lengths_case("float32"), clean_map("float32")),
    )
    assert paragraph(found) == (
        "**float16 breaks in layer 1, residual after MLP (`layers.1`), at token 0 `'.'`**, in `prose` with `<bos>` at "
        "1 token, the shortest that breaks: 70,000 exceeds the float16 maximum, 65,504. With `<bos>`, both texts break "
        "at every length that ran, from 1 to 64 tokens, in layer 1, `'.'`. "
        "Without `<bos>`, 1 of 2 texts breaks (`prose`) from 29 to 64 tokens, in layer 1, `'.'`; the other one is "
        "clean. "
        "bfloat16 (1 case, at least 115.0 bits of headroom) and float32 (1 case, at least 115.0 bits of headroom) are "
        "clean. "
        "What to do: use bfloat16 or float32, which are clean here; to stay in float16, scale the residual stream down "
        "by a power of two first: `stabilitykit repair toy --out toy-float16`."
    )
    assert found.opening.startswith("What 6 finished cases of 6 come to.")
    rows = [row[:4] + row[5:] for row in map(list, table(found).rows)]
    assert rows == [
        ["float16", 4, 4, 3, 1, "layers.1"],
        ["bfloat16", 1, 1, 0, None, None],
        ["float32", 1, 1, 0, None, None],
    ]
    assert table(found).rows[0][4] == pytest.approx(-0.0958, abs=1e-4)


@pytest.mark.parametrize(("with_bos", "without_bos"), [(True, False), (False, True)])
def test_a_break_on_one_side_of_bos_leaves_the_other_clean(tmp_path: Path, with_bos: bool, without_bos: bool) -> None:
    maps = {True: broken_map(), False: clean_map()}
    text = paragraph(
        made(tmp_path, (lengths_case(bos=True), maps[with_bos]), (lengths_case(bos=False), maps[without_bos]))
    )
    breaks, clean = ("With", "Without") if with_bos else ("Without", "With")
    assert FIRST.format(breaks.lower()) in text
    assert f"{breaks} `<bos>`, the one text breaks (`prose`) from 29 to 64 tokens, in layer 1, `'.'`." in text
    assert f"{clean} `<bos>`, the one text is clean." in text
    wide = shlex.join(["--set", "dtype=bfloat16,float32", "--out", f"{tmp_path}/toy-dtype"])
    again = f"(`stabilitykit sweep toy.toml {wide}`)"
    assert f"What to do: run the sweep in bfloat16 and float32 before choosing one of them {again};" in text


def test_different_stories_are_told_one_by_one(tmp_path: Path) -> None:
    text = paragraph(made(tmp_path, (lengths_case(), broken_map()), (lengths_case(prompt="code"), broken_map(first=5))))
    assert (
        "With `<bos>`, both texts break: `prose` from 29 to 64 tokens (layer 1, `'.'`) and `code` from 5 to 64 tokens "
        "(layer 1, `'.'`)."
    ) in text
    assert "at token 4" in text


def test_nothing_breaks(tmp_path: Path) -> None:
    found = made(tmp_path, (lengths_case(), clean_map()), (lengths_case("float32"), clean_map("float32")))
    assert paragraph(found) == (
        "**Nothing breaks**: float16 (1 case, at least 3.0 bits of headroom) and float32 (1 case, at least 115.0 bits "
        "of headroom) are clean. What to do: nothing for texts like these; float16 has the least headroom, 3.0 bits."
    )


def test_a_narrow_escape_is_no_clean_bill(tmp_path: Path) -> None:
    text = paragraph(made(tmp_path, (run_case(), clean_run(amax=50000.0))))
    assert text == (
        "**Nothing breaks**: float16 (1 case, at least 0.39 bits of headroom) is clean. What to do: treat float16 as "
        "broken all the same: `prose` leaves 0.39 bits of headroom, and a value twice as large would overflow."
    )


def test_without_float16_its_fate_is_told_from_what_was_stored(tmp_path: Path) -> None:
    text = paragraph(made(tmp_path, (lengths_case("float32"), clean_map("float32", amax=104000.0))))
    assert text.startswith(
        "float16 is not part of this sweep; the largest value that float32 stored, 104,000 in `prose`, would overflow "
        "it (maximum 65,504). **Nothing breaks**: float32 (1 case, at least 111.3 bits of headroom) is "
        "clean."
    )
    roomy = paragraph(made(tmp_path / "roomy", (lengths_case("float32"), clean_map("float32"))))
    assert "8,188 in `prose`, would leave 3.0 bits of headroom in it." in roomy


def test_another_low_precision_may_be_the_one_that_breaks(tmp_path: Path) -> None:
    text = paragraph(
        made(tmp_path, (run_case("float8_e5m2"), broken_run("float8_e5m2")), (run_case("float16"), clean_run()))
    )
    assert text.startswith("**float8_e5m2 breaks in layer 0, residual after MLP (`layers.0`), at token 0")
    assert "Sampling then raises `no 'probabilities'`, seen at 3 tokens." in text
    assert "float16 (1 case, at least 2.0 bits of headroom) is clean." in text
    assert "to stay in float8_e5m2, scale" in text
    assert "use bfloat16 or float32, whose range holds these values though it did not run;" in text


def test_a_break_that_is_not_of_range_is_not_cured_by_a_wider_format(tmp_path: Path) -> None:
    runs = [(run_case(dtype), broken_run(dtype, kind="weight")) for dtype in ("float16", "float32")]
    text = paragraph(made(tmp_path, *runs))
    assert "were not finite to begin with" in text
    assert "What to do: Look at them in the checkpoint: if it is finite there, load the model in a format" in text
    assert "power of two" not in text


def test_runs_at_two_lengths_leave_open_where_between_them_it_begins(tmp_path: Path) -> None:
    longer = broken_run()
    longer.header = replace(longer.header, tokens=(tuple(range(9)),))
    text = paragraph(made(tmp_path, (run_case(), clean_run()), (run_case(length=9), longer)))
    assert "the one text breaks (`prose`) at 9 tokens, though not yet at 3, in layer 0, `'<bos>'`." in text


def test_a_break_that_comes_and_goes_is_called_that(tmp_path: Path) -> None:
    spans = tuple(
        Span(first=at, last=at, run=at, site="layers.0", layer=0, order=1, broke=broke() if at == 2 else None)
        for at in (1, 2, 3)
    )
    text = paragraph(made(tmp_path, (lengths_case(), LengthMap(clean_map().header, spans, ()))))
    assert "at some lengths from 1 to 3 tokens, 2 tokens the shortest, in layer 0." in text


def test_what_the_sweep_varies_tells_texts_apart(tmp_path: Path) -> None:
    text = paragraph(
        made(
            tmp_path,
            (lengths_case(rescale=1.0), clean_map()),
            (lengths_case(rescale=8.0), broken_map()),
        )
    )
    assert "1 of 2 texts breaks (`prose, rescale 8.0`) from 29 to 64 tokens" in text


def test_what_failed_or_is_missing_is_said(tmp_path: Path) -> None:
    found = made(
        tmp_path,
        (lengths_case(), clean_map()),
        (lengths_case("bfloat16"), Failure(kind="killed", reason="Killed by signal 9.")),
        (lengths_case("float32"), None),
        (memory_case(), None),
    )
    text = paragraph(found)
    assert text.startswith("**Nothing that has finished breaks**")
    assert text.endswith("Not included: of 3 cases, 1 failed (killed) and 1 has not run, in bfloat16 and float32.")
    assert [list(row[:3]) for row in table(found).rows] == [["float16", 1, 1], ["bfloat16", 1, 0], ["float32", 1, 0]]


def test_an_empty_sweep_has_no_verdict_and_says_so(tmp_path: Path) -> None:
    found = made(tmp_path, (lengths_case(), None), (run_case(), None))
    assert found.opening == "There is no verdict yet: none of 2 cases that would run a prompt has finished."
    assert paragraph(found) == "Not included: of 2 cases, 2 have not run, in float16."
    assert made(tmp_path / "memory", (memory_case(), None)).opening == (
        "This experiment runs no prompt, so there is nothing to judge."
    )


def test_a_break_that_never_reaches_the_logits_is_said_to_be_hidden(tmp_path: Path) -> None:
    run = broken_run(error=None)
    run.records[-1] = replace(run.records[-1], nan=0, amax=1.0)
    text = paragraph(made(tmp_path, (run_case(), run)))
    assert "In 1 recorded run, at 3 tokens, the logits are finite all the same, which hides the break." in text


def test_a_partial_sum_or_a_division_leaves_the_headroom_to_what_was_stored(tmp_path: Path) -> None:
    for kind in ("reduction", "invalid"):
        found = made(tmp_path / kind, (run_case(), broken_run(kind=kind)))
        assert table(found).rows[0][4] == pytest.approx(0.1266, abs=1e-4)  # of 60,000, not of the 68,000 that broke
