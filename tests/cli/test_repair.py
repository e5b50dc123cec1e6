"""`repair` and `verify` from the command line: what people and scripts read, and how they refuse."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from remedied import SPECS, breaking, small

from stabilitykit.checkpoints.export import write_folder

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "gemma"
    folder.mkdir()
    write_folder(small(2, 2 * breaking(2)), folder, "float32")
    return folder


@pytest.mark.slow
def test_a_repair_is_ranked_written_and_verified(stabilitykit: Run, broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "repaired"
    made = stabilitykit("repair", str(broken), "--out", str(out), "--ranking-tokens", "300")
    assert (made.code, made.err) == (0, "")
    assert "Against float32, over 300 held-out tokens" in made.out
    assert re.search(r"^float16 +–", made.out, re.MULTILINE)  # a dash: not finite
    assert "parameters by powers of two, the residual stream by 2^-" in made.out
    assert "a folder carries" in made.out or "Closest to float32 is scaling" in made.out
    again = stabilitykit("verify", str(out))
    assert (again.code, again.err) == (0, "")
    assert re.search(r"^prompt 1, eager +[\d,]+ +0 +–$", again.out, re.MULTILINE)
    assert "Everything is as it was written." in again.out
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x3c")
    changed = stabilitykit("verify", str(out), "--json")
    assert changed.code == 1
    assert "has changed since it was written" in json.loads(changed.out)["problems"][0]


@pytest.mark.slow
def test_one_document_for_scripts_and_no_ranking(stabilitykit: Run, broken: Path) -> None:
    made = stabilitykit("repair", str(broken), "--json", "--margin", "3", "--no-ranking")
    assert (made.code, made.err) == (0, "")
    found = json.loads(made.out)
    assert found["out"] is None
    assert found["scores"] == []
    assert found["peak"] > 65504 >= 8 * found["scaled_peak"]
    assert found["scaling"]["settings"]["rms_eps"] < 0


@pytest.mark.slow
def test_a_sweeps_report_gets_the_remedies(stabilitykit: Run, broken: Path, tmp_path: Path) -> None:
    new = tmp_path / "alone"
    made = stabilitykit("repair", str(broken), "--report", str(new), "--ranking-tokens", "300")
    assert (made.code, made.err) == (0, "")
    assert f"Report: {new}/report.html" in made.out.replace("\n", "")
    text = (new / "report.md").read_text()
    assert "## Remedies" in text
    assert "| scaling |" in text
    experiment = tmp_path / "toy.toml"
    experiment.write_text(f'checkpoint = "{broken}"\n[[grid]]\nprompt = "digits"\nlength = 4\n')
    sweep = tmp_path / "sweep"
    assert stabilitykit("sweep", str(experiment), "--out", str(sweep)).code == 0
    assert "## Remedies" not in (sweep / "report.md").read_text()
    shutil.copy(new / "remedies.json", sweep)
    assert stabilitykit("report", str(sweep)).code == 0
    assert "| scaling |" in (sweep / "report.md").read_text()
    other = stabilitykit("repair", SPECS[1], "--report", str(sweep))
    assert other.code == 2
    assert "is about another checkpoint" in other.err


@pytest.mark.slow
def test_where_nothing_is_broken_nothing_is_changed(stabilitykit: Run) -> None:
    made = stabilitykit("repair", SPECS[3], "--ranking-tokens", "300")
    assert made.code == 0
    assert "scales" not in made.out
    assert "Nothing has to be changed" in made.out


def test_misuse_is_one_sentence(stabilitykit: Run, broken: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (("repair", "hf:nobody/nothing"), "nobody/nothing"),
        (("repair", str(broken), "--device", "abacus"), "cannot be used here"),
        (("repair", str(broken), "--out", str(broken)), "is not empty; choose a new or an empty folder"),
        (("repair", str(broken), "--prompts", str(tmp_path / "none.txt")), "none.txt"),
        (("repair", str(broken), "--ranking-tokens", "2"), "take at least 6 tokens; 2 are fewer"),
        (("repair", str(broken), "--adapter", str(tmp_path)), "write hf: before"),
        (("verify", str(tmp_path)), "has no repair.json"),
    ):
        result = stabilitykit(*arguments)
        assert result.code == 2, arguments
        assert said in result.err
        assert "Traceback" not in result.err
