"""The forecast section: every float32 run that says what is stored in 16 bits, and a reason where there is none."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from swept import broken_run, clean_run, run_case, sweep

from stabilitykit.records import FormatCounts, Recording
from stabilitykit.report.blocks import Prose, Table
from stabilitykit.report.sections import forecast


def told(past: int = 0, amax: float = 16376.0) -> Recording:
    """A float32 run of three tensors, all stored in 16 bits; the second has `past` elements past float16's range."""
    run = clean_run("float32", amax)
    counts = FormatCounts(past, 3, 1)
    run.records = [
        replace(record, stored_dtype="float16", formats={"float16": counts if place == 1 else FormatCounts(0, 0, 0)})
        for place, record in enumerate(run.records)
    ]
    return run


def test_each_run_and_format_is_a_row(tmp_path: Path) -> None:
    pairs = [(run_case("float32"), told()), (run_case("float32", bos=False), told(past=2, amax=70000.0))]
    found = forecast.section(sweep(tmp_path / "reports", pairs))
    (table,) = [block for block in found.blocks if isinstance(block, Table)]
    rows: list[object] = [tuple(row) for row in table.rows]
    assert rows == [
        ("prose, 3 tokens, with <bos>", "float16", 0, "±inf", 3 / 36, 1 / 36,
         pytest.approx(math.log2(65504 / 16376)), None, None, None, "layer 1, layers.1"),
        ("prose, 3 tokens, without <bos>", "float16", 2, "±inf", 3 / 36, 1 / 36,
         pytest.approx(math.log2(65504 / 70000)), "layer 1, layers.1", " a", 2, "layer 1, layers.1"),
    ]  # fmt: skip
    said = [block.text for block in found.blocks if isinstance(block, Prose)]
    assert "float16 would hold every value" in said[0]
    assert "float16 would break first in layer 1" in said[1]
    assert "2 elements leave its range" in said[1]


def test_runs_that_say_too_little_are_left_out(tmp_path: Path) -> None:
    pairs = [(run_case("float32"), clean_run("float32")), (run_case("float32", bos=False), broken_run("float32"))]
    found = forecast.section(sweep(tmp_path / "reports", pairs))
    assert not found.blocks
    assert "no finished run that would be drawn here holds a finite float32 run" in found.opening
