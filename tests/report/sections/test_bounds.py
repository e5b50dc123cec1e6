"""The section on bounds: a sentence, a row a kind, every tensor, the method, a figure."""

from pathlib import Path

import pytest
from bounded import bounds
from swept import sweep

from stabilitykit.diagnosis.bounds import by_kind, summary
from stabilitykit.report.blocks import Figure, Prose, Table
from stabilitykit.report.figures import draw_all
from stabilitykit.report.sections import bounds as section_of
from stabilitykit.report.sections import shown


def test_without_any_it_says_how_to_compute_them(tmp_path: Path) -> None:
    found = section_of.section(sweep(tmp_path / "reports", []))
    assert not found.blocks
    assert f"`stabilitykit bound toy --report {tmp_path}/reports`" in found.opening


def test_what_is_known_of_each_kind_and_each_tensor(tmp_path: Path) -> None:
    results = sweep(tmp_path / "reports", [], sections=("memory",))
    results.write_finding(bounds())
    assert shown(results) == ["memory", "bounds"]
    found = section_of.section(results)
    tables = {block.name: block for block in found.blocks if isinstance(block, Table)}
    rows = {row[0]: list(row) for row in tables["bounds-by-kind"].rows}
    assert rows["down projection"] == [
        "down projection", "reachable by a hidden state, 1 of 2", 80_000.0, 1, 66_000.0, pytest.approx(70 / 66), 20.0,
    ]  # fmt: skip
    assert rows["residual after MLP"][1] == "reachable by a prompt, 1 of 2"
    assert len(tables["bounds"].rows) == 6
    said = " ".join(block.text for block in found.blocks if isinstance(block, Prose))
    assert summary(bounds().sites) in said
    assert "`stabilitykit bound toy`" in said
    (figure,) = [block for block in found.blocks if isinstance(block, Figure)]
    (drawing,) = draw_all([figure])
    assert "float16 maximum, 65,504" in drawing.svg
    assert "layer 1: bound 80,000, found 60,000, observed 20, open" in drawing.svg


def test_the_sentence_counts() -> None:
    assert summary(bounds().sites) == (
        "Of 6 tensors, 2 stay below the float16 maximum, 65,504, for every prompt. The others: 2 open, 1 reachable by "
        "a hidden state, 1 reachable by a prompt."
    )
    safe = [one for one in bounds().sites if one.bound < 65504]
    assert summary(safe) == "No prompt makes any of this checkpoint's 2 tensors overflow in float16."
    assert by_kind(bounds().sites)[1].worst.layer == 1
