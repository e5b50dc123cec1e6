"""`repair` and `verify` from the command line: what people and scripts read, and how they refuse."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import family_model
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
    made = stabilitykit("repair", str(broken), "--out", str(out))
    assert made.code == 0
    assert "Against float32, over 4,608 held-out tokens" in made.out
    assert re.search(r"^float16 +–", made.out, re.MULTILINE)  # a dash: not finite
    assert "Rescaled by 0." in made.out
    assert "a folder carries" in made.out or "Closest to float32 is rescale" in made.out
    again = stabilitykit("verify", str(out))
    assert (again.code, again.err) == (0, "")
    assert "Everything is as it was written." in again.out
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x3c")
    changed = stabilitykit("verify", str(out), "--json")
    assert changed.code == 1
    assert "has changed since it was written" in json.loads(changed.out)["problems"][0]


@pytest.mark.slow
def test_one_document_for_scripts(stabilitykit: Run, broken: Path) -> None:
    made = stabilitykit("repair", str(broken), "--json", "--margin", "3")
    assert (made.code, made.err) == (0, "")
    found = json.loads(made.out)
    assert found["out"] is None
    assert found["peak"] * found["gamma"] <= 65504 / 8
    assert not {score["name"]: score["finite"] for score in found["scores"]}["float16"]


@pytest.mark.slow
def test_a_sweeps_report_gets_the_remedies(stabilitykit: Run, broken: Path, tmp_path: Path) -> None:
    new = tmp_path / "alone"
    made = stabilitykit("repair", str(broken), "--report", str(new))
    assert (made.code, made.err) == (0, "")
    assert f"Report: {new}/report.html" in made.out.replace("\n", "")
    text = (new / "report.md").read_text()
    assert "## Remedies" in text
    assert "| rescale 2^-" in text
    experiment = tmp_path / "toy.toml"
    experiment.write_text(f'checkpoint = "{broken}"\n[[grid]]\nprompt = "digits"\nlength = 4\n')
    sweep = tmp_path / "sweep"
    assert stabilitykit("sweep", str(experiment), "--out", str(sweep)).code == 0
    assert "## Remedies" not in (sweep / "report.md").read_text()
    shutil.copy(new / "remedies.json", sweep)
    assert stabilitykit("report", str(sweep)).code == 0
    assert "| rescale 2^-" in (sweep / "report.md").read_text()
    other = stabilitykit("repair", SPECS[1], "--report", str(sweep))
    assert other.code == 2
    assert "is about another checkpoint" in other.err


@pytest.mark.slow
def test_where_nothing_is_broken_nothing_is_changed(stabilitykit: Run) -> None:
    made = stabilitykit("repair", SPECS[3])
    assert made.code == 0
    assert "Rescaled" not in made.out
    assert "Nothing has to be changed" in made.out


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_a_family_that_it_would_change_is_refused_by_name(stabilitykit: Run, tmp_path: Path, family: str) -> None:
    family_model(family).save_pretrained(tmp_path / family)
    refused = stabilitykit("repair", str(tmp_path / family))
    assert refused.code == 2
    assert "raw residual stream" in refused.err
    assert family in refused.err


def test_misuse_is_one_sentence(stabilitykit: Run, broken: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (("repair", "hf:nobody/nothing"), "nobody/nothing"),
        (("repair", str(broken), "--device", "abacus"), "cannot be used here"),
        (("repair", str(broken), "--out", str(broken)), "is not empty; choose a new or an empty folder"),
        (("repair", str(broken), "--prompts", str(tmp_path / "none.txt")), "none.txt"),
        (("repair", str(broken), "--margin", "30"), "Try a smaller --margin"),
        (("verify", str(tmp_path)), "has no repair.json"),
    ):
        result = stabilitykit(*arguments)
        assert result.code == 2, arguments
        assert said in result.err
        assert "Traceback" not in result.err
