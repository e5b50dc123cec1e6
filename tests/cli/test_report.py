"""`report` of sweeps that are empty, torn, or of one case: it can be read, and says what is missing."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from swept import broken_run, clean_run, layered_run, lengths_case, memory_case, plan, run_case, sweep

from stabilitykit.records.sweep import Failure, Results
from stabilitykit.report.sections import USUAL

Run = Callable[..., Any]


def text_of(folder: Path) -> str:
    return (folder / "report.md").read_text()


def sections(text: str) -> dict[str, str]:
    """By their anchors."""
    parts = text.split('<a id="')[1:]
    return {part.partition('"')[0]: part.partition("</a>")[2].strip() for part in parts}


def test_the_report_of_a_sweep_in_which_nothing_finished_says_so_in_every_section(
    stabilitykit: Run, tmp_path: Path
) -> None:
    sweep(tmp_path, [(run_case(), None), (lengths_case("bfloat16"), None), (memory_case(), None)])
    result = stabilitykit("report", str(tmp_path))
    assert result.code == 0
    assert "There is no verdict yet" in result.out
    found = sections(text_of(tmp_path))
    assert tuple(found) == USUAL
    assert (
        "There is no verdict yet: none of 2 cases that would run a prompt has finished.\n\n"
        "Not included: of 2 cases, 2 have not run, in bfloat16 and float16."
    ) in found["verdict"]
    for key in ("lengths", "chain", "peaks", "heat", "exponents", "softmax", "error", "memory"):
        assert re.search(r"finished", found[key]), key
    assert "Of 3 cases, 0 are done, 3 missing." in found["provenance"]
    assert not list(tmp_path.glob("figures/*"))


def test_the_report_of_a_torn_sweep_says_what_failed_and_what_is_missing(stabilitykit: Run, tmp_path: Path) -> None:
    sweep(
        tmp_path,
        [
            (run_case(), broken_run()),
            (run_case("float32"), clean_run("float32")),
            (run_case("bfloat16"), Failure(kind="killed", reason="the process was ended by SIGKILL")),
            (run_case("bfloat16", bos=False), None),
            (memory_case(), Failure(kind="raised", reason="StabilityKitError: no room")),
        ],
    )
    result = stabilitykit("report", str(tmp_path))
    assert (result.code, result.err) == (0, "")
    missing = "Not included: of 4 cases, 1 failed (killed) and 1 has not run, in bfloat16."
    assert missing in " ".join(result.out.split())
    found = sections(text_of(tmp_path))
    assert "What 2 finished cases of 4 come to." in found["verdict"]
    assert "**float16 breaks in layer 0" in found["verdict"]
    assert missing in found["verdict"]
    assert "Of 4 planned runs, 1 failed" in found["peaks"]
    assert "Of 5 cases, 2 are done, 2 failed and 1 missing." in found["provenance"]
    for said in ("killed: The process was ended by SIGKILL.", "raised: StabilityKitError: no room."):
        assert said in found["provenance"]


def test_the_report_of_one_case_speaks_of_one_case(stabilitykit: Run, tmp_path: Path) -> None:
    sweep(tmp_path, [(run_case("float32"), clean_run("float32"))], sections=("verdict", "lengths"))
    result = stabilitykit("report", str(tmp_path))
    assert (result.code, result.err) == (0, "")
    found = sections(text_of(tmp_path))
    assert tuple(found) == ("verdict", "lengths")
    assert "1 finished case of 1" in found["verdict"]
    assert "**Nothing breaks**: float32 (1 case, at least" in found["verdict"]


def test_against_another_report_says_what_changed(stabilitykit: Run, tmp_path: Path) -> None:
    only = {"sections": ("verdict", "provenance")}
    sweep(tmp_path / "before", [(run_case(), broken_run())], **only)
    sweep(tmp_path / "now", [(run_case(), clean_run())], **only)
    assert stabilitykit("report", str(tmp_path / "now")).code == 0
    assert "against" not in sections(text_of(tmp_path / "now"))
    result = stabilitykit("report", str(tmp_path / "now"), "--against", str(tmp_path / "before"))
    assert result.code == 0
    assert "Against A toy" in result.out
    found = sections(text_of(tmp_path / "now"))
    assert tuple(found) == ("verdict", "against", "provenance")
    assert "What changed since the report in before, by 1 case finished in both." in found["against"]
    assert "1 row under “First breaks”" in found["against"]


@pytest.mark.parametrize("arguments", [("none",), ("sweep", "--against", "none")])
def test_a_folder_that_holds_no_sweep_is_refused(
    stabilitykit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Results.create(Path("sweep"), plan([]))
    result = stabilitykit("report", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "stabilitykit: none has no experiment.json, so it is not a sweep's folder. Make one with `stabilitykit "
        "sweep`.\n"
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["sweep", "experiment.json"]


def test_the_format_to_judge_by_can_be_asked_for(stabilitykit: Run, tmp_path: Path) -> None:
    sweep(tmp_path, [(run_case("float32"), layered_run("float32"))])
    assert stabilitykit("report", str(tmp_path), "--format", "float8_e4m3fn").code == 0
    assert "the float8_e4m3fn maximum, 448" in text_of(tmp_path)
    assert stabilitykit("report", str(tmp_path)).code == 0
    assert "the float16 maximum, 65,504" in text_of(tmp_path)
    unknown = stabilitykit("report", str(tmp_path), "--format", "int8")
    assert (unknown.code, "'int8'" in unknown.err, "Traceback" in unknown.err) == (2, True, False)
