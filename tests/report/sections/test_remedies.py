"""The section on remedies: the ranking as it was written, or what would put one there."""

from dataclasses import replace
from pathlib import Path

from scored import ranking, score
from swept import sweep

from stabilitykit.report.blocks import Figure, Prose, Table
from stabilitykit.report.figures import draw_all
from stabilitykit.report.sections import USUAL, remedies, shown


def test_without_a_ranking_it_says_how_to_make_one(tmp_path: Path) -> None:
    found = remedies.section(sweep(tmp_path / "reports", []))
    assert not found.blocks
    assert f"`stabilitykit repair toy --report {tmp_path}/reports`" in found.opening


def test_every_remedy_is_a_row_best_first(tmp_path: Path) -> None:
    results = sweep(tmp_path / "reports", [])
    results.write_finding(ranking())
    found = remedies.section(results)
    tables = {block.name: block for block in found.blocks if isinstance(block, Table)}
    rows = [list(row) for row in tables["remedies"].rows]
    assert [row[0] for row in rows] == ["float32 residual", "scaling", "bfloat16", "float16"]
    assert rows[0][1:3] == [1e-5, 1e-5]
    assert rows[3][1:] == [*[None] * 7, 2**20, 0, 1.0]
    assert [row[:2] for row in tables["remedies-explained"].rows][:2] == [
        ["float32 residual", False],
        ["scaling", True],
    ]
    assert [list(row) for row in tables["scaled"].rows] == [
        ["embed_tokens.weight", "2^-2"],
        ["layers.*.mlp.down_proj.weight", "2^-2 to 2^1"],
        ["norm.weight", "2^2"],
    ]
    assert [list(row) for row in tables["remedies-left-out"].rows] == [["clamp", "It has no layers."]]
    assert [row[0] for row in tables["islands"].rows] == ["layers.1", "layers.1/add.0"]
    said = " ".join(block.text for block in found.blocks if isinstance(block, Prose))
    assert "What a folder carries is scaling" in said
    assert "one token among 1,000 makes up 25%" in said
    assert "`stabilitykit repair toy`" in said
    (figure,) = [block for block in found.blocks if isinstance(block, Figure)]
    (drawing,) = draw_all([figure])
    assert "bfloat16" in drawing.svg


def test_what_returns_no_logits_has_errors_in_place_of_divergences() -> None:
    scores = [replace(score(name, None), finite=True, error=error) for name, error in (("a", 1e-3), ("b", 2e-3))]
    measured, _ = remedies.of_scores(scores)
    assert isinstance(measured, Table)
    assert [column.name for column in measured.columns] == ["remedy", "error", "weights", "extra", "time"]
    assert [row[:2] for row in measured.rows] == [["a", 1e-3], ["b", 2e-3]]
    assert "rows" in measured.title


def test_without_a_ranking_there_is_what_the_scaling_does() -> None:
    taken, more, left_out = remedies.blocks(replace(ranking(), scores=()))
    assert isinstance(taken, Prose)
    assert taken == Prose("The scaled model fits in float16, with 1.4 bits of headroom.", tone="good")
    assert isinstance(more, Prose)
    assert more.text.startswith("The repair scales 4 of 30 parameters")
    assert isinstance(left_out, Table)


def test_an_experiments_own_sections_get_it_too_once_there_is_one(tmp_path: Path) -> None:
    results = sweep(tmp_path / "reports", [], sections=("memory",))
    assert shown(results) == ["memory"]
    results.write_finding(ranking())
    assert shown(results) == ["memory", "remedies"]
    usual = sweep(tmp_path / "usual", [])
    assert shown(usual) == list(USUAL)
    usual.write_finding(ranking())
    assert shown(usual) == [*USUAL[:-1], "remedies", "provenance"]
