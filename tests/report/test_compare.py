"""What is said to have changed from one report to another, and that nothing is when nothing did."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from swept import (
    broken_map,
    broken_run,
    clean_map,
    clean_run,
    lengths_case,
    logits_error,
    memory,
    memory_case,
    run_case,
    sweep,
)

from stabilitykit.formats import BFLOAT16, FLOAT16, FLOAT32
from stabilitykit.records.sweep import Failure
from stabilitykit.report.blocks import Prose, Section, Table
from stabilitykit.report.compare import MOST_SITES, compare, ulps


def compared(folder: Path, before: list[Any], now: list[Any], **changes: Any) -> Section:
    return compare(sweep(folder / "now", now, **changes), sweep(folder / "before", before))


def tables(found: Section) -> dict[str, list[list[Any]]]:
    return {block.name: [list(row) for row in block.rows] for block in found.blocks if isinstance(block, Table)}


def summary(found: Section) -> str:
    block = found.blocks[0]
    assert isinstance(block, Prose)
    return block.text


EVERYTHING = [
    (run_case(), broken_run()),
    (run_case("float32"), clean_run("float32")),
    (run_case("bfloat16"), clean_run("bfloat16", logits_error=logits_error())),
    (lengths_case(), broken_map()),
    (memory_case(), memory()),
]


def test_the_same_results_have_not_changed(tmp_path: Path) -> None:
    found = compared(tmp_path, EVERYTHING, EVERYTHING)
    assert (found.key, found.title) == ("against", "Against A toy")
    assert found.opening.startswith("What changed since the report in before, by 5 cases finished in both.")
    assert summary(found) == (
        "**Nothing changed** in all 5 common cases: neither first breaks nor tokens, peaks, errors of the logits or "
        "memory, so far as both reports hold them."
    )
    assert not tables(found)


def test_changes_of_the_plan_are_said_even_where_nothing_else_changed(tmp_path: Path) -> None:
    found = compared(tmp_path, EVERYTHING[:1], EVERYTHING[:1], checkpoint="other", versions={"torch": "3.0"})
    assert summary(found).startswith(
        "The checkpoint was toy and is other. Torch was 2.9 and is 3.0. **Nothing else changed** in its "
        "only common case"
    )


def test_a_case_is_the_same_whatever_the_digest_of_its_text(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        [(run_case(text_sha256="a"), clean_run())],
        [(run_case(text_sha256="b"), clean_run())],
    )
    assert "The text of prose changed" in summary(found)
    assert "**Nothing else changed**" in summary(found)


@pytest.mark.parametrize(("rescale", "same"), [(1.0, True), (2.0, False)])
def test_a_case_is_the_same_whether_a_usual_setting_is_written_down_or_not(
    tmp_path: Path, rescale: float, same: bool
) -> None:
    found = compared(tmp_path, [(run_case(), clean_run())], [(run_case(rescale=rescale), clean_run())])
    assert ("**Nothing changed** in its only common case" in summary(found)) == same
    assert ("nothing to compare" in summary(found)) == (not same)


def test_cases_and_states_that_differ_are_listed(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        [(run_case(), clean_run()), (run_case("bfloat16"), None), (memory_case(), memory())],
        [
            (run_case(), clean_run()),
            (run_case("bfloat16"), Failure(kind="killed", reason="Killed.")),
            (lengths_case(), clean_map()),
        ],
    )
    assert tables(found)["against-cases"] == [
        ["prose, 3 tokens, with <bos>", "bfloat16", "missing", "failed: killed"],
        ["prose, 1..64 tokens, with <bos>", "float16", "not planned", "done"],
        ["memory, 128 tokens", "float16", "done", "not planned"],
    ]
    assert summary(found) == "**Something changed**: 3 rows under “Cases”."


def test_what_broke_and_what_no_longer_does(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        [(run_case(), clean_run()), (lengths_case(), broken_map()), (lengths_case(bos=False), broken_map())],
        [(run_case(), broken_run()), (lengths_case(), clean_map()), (lengths_case(bos=False), broken_map(first=7))],
    )
    assert tables(found)["against-breaks"] == [
        ["prose, 3 tokens, with <bos>", "float16", "breaks", "clean", "at 3 tokens in layers.0"],
        ["prose, 1..64 tokens, with <bos>", "float16", "breaks", "at 29 tokens in layers.1", "clean"],
        ["prose, 1..64 tokens, without <bos>", "float16", "first broken length", 29, 7],
        ["prose, 1..64 tokens, without <bos>", "float16", "position", 28, 6],
    ]


def test_a_first_break_that_moved_to_another_site_is_seen_at_every_length(tmp_path: Path) -> None:
    before = broken_map()
    last = before.spans[-1]
    split = (*before.spans[:-1], replace(last, last=40), replace(last, first=41, site="layers.0"))
    found = compared(tmp_path, [(lengths_case(), before)], [(lengths_case(), replace(before, spans=split))])
    assert tables(found)["against-breaks"] == [
        [
            "prose, 1..64 tokens, with <bos>",
            "float16",
            "site at 41 tokens and 23 other lengths",
            "layers.1",
            "layers.0",
        ]
    ]


def test_peaks_count_as_moved_past_four_ulp_and_the_worst_comes_first(tmp_path: Path) -> None:
    # A float16 in [8192, 16384) has an ulp of 8.
    found = compared(
        tmp_path,
        [(run_case(), clean_run(amax=16000.0)), (run_case(bos=False), clean_run(amax=16000.0))],
        [(run_case(), clean_run(amax=16032.0)), (run_case(bos=False), clean_run(amax=16040.0))],
    )
    assert tables(found)["against-peaks"] == [
        ["prose, 3 tokens, without <bos>", "float16", "layers.1", 16000.0, 16040.0, 5.0, None]
    ]
    curve = compared(
        tmp_path / "curve", [(lengths_case(), clean_map(amax=8192.0))], [(lengths_case(), clean_map(amax=16384.0))]
    )
    assert tables(curve)["against-peaks"] == [
        [
            "prose, 1..64 tokens, with <bos>",
            "float16",
            "the largest of all sites, at 1 token",
            4096.0,
            8192.0,
            1024.0,
            None,
        ]
    ]


def test_of_a_curve_the_length_that_moved_most_is_named(tmp_path: Path) -> None:
    before = clean_map(amax=8192.0)
    now = replace(before, peaks=(replace(before.peaks[0], amax=4096.0 + 40), replace(before.peaks[1], amax=16384.0)))
    (row,) = tables(compared(tmp_path, [(lengths_case(), before)], [(lengths_case(), now)]))["against-peaks"]
    assert row[2:6] == ["the largest of all sites, at 5 tokens", 8192.0, 16384.0, 1024.0]


def test_many_moved_sites_are_cut_short_and_counted(tmp_path: Path) -> None:
    before, now = clean_run(), clean_run()
    before.records = [replace(before.records[0], site=f"layers.{i}", order=i) for i in range(30)]
    now.records = [replace(record, amax=100.0 + index) for index, record in enumerate(before.records)]
    rows = tables(compared(tmp_path, [(run_case(), before)], [(run_case(), now)]))["against-peaks"]
    assert len(rows) == MOST_SITES
    assert [row[2] for row in rows][:2] == ["layers.29", "layers.28"]
    assert rows[0][-1] == 30


def test_errors_of_the_logits_are_compared_where_both_have_them(tmp_path: Path) -> None:
    def run(error: Any) -> list[Any]:
        return [(run_case("bfloat16"), clean_run("bfloat16", logits_error=error))]

    found = compared(tmp_path, run(logits_error()), run(logits_error(2e-3, top1=0.8)))
    assert tables(found)["against-logits"] == [
        ["prose, 3 tokens, with <bos>", "bfloat16", "KL, mean", 1e-3, 2e-3],
        ["prose, 3 tokens, with <bos>", "bfloat16", "KL, largest", 1e-2, 2e-2],
        ["prose, 3 tokens, with <bos>", "bfloat16", "top-1 agreement", 0.9, 0.8],
    ]
    assert not tables(compared(tmp_path / "noise", run(logits_error()), run(logits_error(1.001e-3))))
    assert not tables(compared(tmp_path / "one", run(None), run(logits_error())))


def test_memory_is_compared_by_part_and_by_peak(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        [(memory_case(), memory())],
        [(memory_case(), replace(memory(measured=1200), cache=200))],
    )
    assert tables(found)["against-memory"] == [
        ["memory, 128 tokens", "float16", "cache, computed", 100, 200],
        ["memory, 128 tokens", "float16", "peak without libraries, measured", 1040, 1200],
    ]


def test_reports_without_a_common_case_have_nothing_to_compare(tmp_path: Path) -> None:
    found = compared(tmp_path, [(run_case(), None)], [(run_case(), clean_run())])
    assert "No case has finished in both, so there is nothing to compare." in summary(found)
    assert tables(found)["against-cases"] == [["prose, 3 tokens, with <bos>", "float16", "missing", "done"]]
    assert "by no cases finished in both" in found.opening


@pytest.mark.parametrize(
    ("form", "before", "after", "expected"),
    [
        (FLOAT16, 1.0, 1.0 + 2.0**-10, 1.0),
        (FLOAT16, 2.0, 2.0 + 2.0**-10, 0.5),
        (FLOAT16, 65504.0, 65472.0, 1.0),
        (FLOAT16, 0.0, 2.0**-24, 1.0),
        (FLOAT16, 2.0**-20, 2.0**-20 + 2.0**-24, 1.0),
        (BFLOAT16, 256.0, 258.0, 1.0),
        (FLOAT32, 1.0, 1.0 - 2.0**-23, 1.0),
    ],
)
def test_ulps(form: Any, before: float, after: float, expected: float) -> None:
    assert ulps(form, before, after) == expected
