"""What has to be known to make the numbers again, and what became of every case."""

from pathlib import Path
from typing import Any

from swept import broken_run, clean_run, run_case, sweep

from stabilitykit.records.sweep import Failure
from stabilitykit.report.blocks import Prose, Section, Table
from stabilitykit.report.sections import SECTIONS, USUAL
from stabilitykit.report.sections.provenance import section


def made(folder: Path, *pairs: Any, **changes: Any) -> Section:
    return section(sweep(folder / "toy", pairs, **changes))


def tables(found: Section) -> dict[str, Table]:
    return {block.name: block for block in found.blocks if isinstance(block, Table)}


def test_every_case_has_its_state_and_its_reason(tmp_path: Path) -> None:
    found = made(
        tmp_path,
        (run_case(), broken_run()),
        (run_case("bfloat16"), Failure(kind="out of memory", reason="needed 9 GiB")),
        (run_case("float32"), None),
    )
    assert [list(row[1:4]) for row in tables(found)["cases"].rows] == [
        ["prose 3 tokens with <bos> float16", "done", None],
        ["prose 3 tokens with <bos> bfloat16", "failed", "out of memory: Needed 9 GiB."],
        ["prose 3 tokens with <bos> float32", "missing", None],
    ]
    assert "Of 3 cases, 1 is done, 1 failed and 1 missing." in found.opening


def test_all_done_one_done_and_nothing_planned_read_well(tmp_path: Path) -> None:
    assert "Its only case is done." in made(tmp_path / "a", (run_case(), clean_run())).opening
    both = ((run_case(), clean_run()), (run_case("float32"), clean_run("float32")))
    assert "All 2 cases are done." in made(tmp_path / "b", *both).opening
    assert "The plan holds no case." in made(tmp_path / "c").opening


def test_checkpoint_versions_machine_arithmetic_command_and_file_are_all_there(tmp_path: Path) -> None:
    found = made(tmp_path, (run_case(), clean_run(matmul="float32-accumulate")), source="a = 1\n\n[axes]")
    command = found.blocks[0]
    assert isinstance(command, Prose)
    assert command.text == "To make this again: `stabilitykit sweep toy.toml`"
    assert [list(row) for row in tables(found)["provenance"].rows] == [
        ["checkpoint", "name", "toy"],
        ["checkpoint", "SHA-256", "ab" * 32],
        ["checkpoint", "note", "dequantised"],
        ["checkpoint", "note", "toy terms"],
        ["matrix products", "float16 on cpu", "float32-accumulate"],
        ["version", "torch", "2.9"],
        ["machine", "cores", "2"],
        ["model", "layers", "2"],
    ]
    assert [list(row) for row in tables(found)["experiment-file"].rows] == [[1, "a = 1"], [2, ""], [3, "[axes]"]]


def test_the_registry_is_in_the_reports_order_and_every_section_has_its_key(tmp_path: Path) -> None:
    assert list(USUAL) == [
        "verdict", "explore", "lengths", "chain", "peaks", "heat", "exponents", "forecast", "softmax", "error",
        "memory", "provenance",
    ]  # fmt: skip
    empty = sweep(tmp_path / "toy", [(run_case(), None)])
    for key, make in SECTIONS.items():
        assert make(empty).key == key
        assert make(empty).opening
