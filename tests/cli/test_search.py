"""`search` from the command line: what people and scripts read, the files it leaves, and how it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted import FIRST, SECOND, dangerous_pair
from remedied import SPECS, rescale

from stabilitykit.checkpoints.export import write_folder
from stabilitykit.records.document import read_document
from stabilitykit.records.search import Search
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Table
from stabilitykit.report.sections import SECTIONS, shown

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that breaks at the prompt "FP"."""
    folder = tmp_path_factory.mktemp("search") / "gemma"
    folder.mkdir()
    write_folder(dangerous_pair(), folder, "float32")
    return folder


def test_finds_are_files_that_other_commands_take(stabilitykit: Run, pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "finds"
    made = stabilitykit("search", str(pair), "--no-bos", "--length", "3", "--out", str(out))
    assert (made.code, made.err) == (0, "")
    said = " ".join(made.out.split())
    assert "Without <bos> the shortest prompt found to break is 'F' 'P' (2 tokens)." in said
    assert "float16 overflows in layer 0, residual after attention" in said
    assert "The worst 20 tokens alone" in said
    assert "The worst 20 tokens inside a text" in said
    assert "after <bos>" not in said
    assert "Reachable only as raw token ids: no text tokenizes to them" in said
    assert (out / "1.txt").read_text() == "FP"
    advised = made.out.partition("To see what becomes of the first: ")[2].splitlines()[0]
    assert advised == f"stabilitykit profile {pair} --prompt @{out}/1.txt --no-bos"
    found = read_document(out / "search.json", Search, "search")
    assert found.finds[0].tokens == (FIRST, SECOND)
    assert found.command == (f"stabilitykit search {pair} --no-bos --length 3 --out {out}")
    prompt = ("--prompt", f"@{out / '1.txt'}")
    profile = stabilitykit("profile", str(pair), *prompt, "--no-bos", "--dtype", "float16", "--json")
    document = json.loads(profile.out)
    assert document["tokens"] == [FIRST, SECOND]
    assert document["first_break"]["site"] == found.finds[0].broken_site == "layers.0/add.0"
    experiment = tmp_path / "toy.toml"
    experiment.write_text(f'checkpoint = "{pair}"\n[[grid]]\nprompt = "@finds/1.txt"\nbos = false\n')
    planned = json.loads(stabilitykit("sweep", str(experiment), "--dry-run", "--json").out)
    assert [case["settings"]["tokens"] for case in planned["cases"]] == [2]
    again = stabilitykit("search", str(pair), "--out", str(out))
    assert again.code == 2
    assert "exists already and is not empty; choose a new or an empty folder" in again.err


@pytest.mark.slow
def test_a_sweeps_report_gets_the_search(stabilitykit: Run, pair: Path, tmp_path: Path) -> None:
    new = tmp_path / "alone"
    made = stabilitykit("search", str(pair), "--limit", "320", "--length", "2", "--report", str(new))
    assert (made.code, made.err) == (0, "")
    text = (new / "report.md").read_text()
    assert "## Dangerous tokens and prompts" in text
    assert "The worst 20 tokens inside a text" in text
    assert (new / "figures" / "headroom-over-the-vocabulary.svg").exists()
    assert "300" in (new / "tables" / "worst-alone.csv").read_text()
    experiment = tmp_path / "toy.toml"
    experiment.write_text(f'checkpoint = "{pair}"\n[[grid]]\nprompt = "digits"\nlength = 4\n')
    sweep = tmp_path / "sweep"
    assert stabilitykit("sweep", str(experiment), "--out", str(sweep), "--no-report").code == 0
    results = Results.open(sweep)
    assert SECTIONS["search"](results).opening.startswith("No search has been run for this checkpoint.")
    found = Results.open(new).search
    assert found is not None
    results.write_finding(found)
    assert "search" in shown(results)
    blocks = SECTIONS["search"](results).blocks
    assert [block.rows[0][0] for block in blocks if isinstance(block, Table) and block.name == "worst-alone"] == ["'P'"]
    other = stabilitykit("search", SPECS[1], "--report", str(sweep))
    assert other.code == 2
    assert "is about another checkpoint" in other.err


@pytest.mark.slow
def test_one_document_for_scripts_and_room_where_it_was_rescaled(stabilitykit: Run, tmp_path: Path) -> None:
    folder = tmp_path / "rescaled"
    folder.mkdir()
    write_folder(rescale(dangerous_pair(), 0.25), folder, "float32")
    made = stabilitykit("search", str(folder), "--no-bos", "--length", "2", "--json")
    assert (made.code, made.err) == (0, "")
    found = json.loads(made.out)
    assert found["out"] is None
    assert not any(find["breaks"] for find in found["finds"])
    assert found["finds"][0]["tokens"] == [FIRST, SECOND]
    assert found["finds"][0]["headroom"] == pytest.approx(1.805, abs=0.01)
    said = " ".join(stabilitykit("search", str(folder), "--no-bos", "--length", "2").out.split())
    assert "Without <bos> no prompt that was tried, up to 2 tokens long, breaks in float16." in said
    assert "1.80 bits below the float16 maximum, 65,504" in said


def test_misuse_is_one_sentence(stabilitykit: Run, pair: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (("search", "hf:nobody/nothing"), "nobody/nothing"),
        (("search", str(tmp_path / "none")), "none"),
        (("search", str(pair), "--device", "abacus"), "cannot be used here"),
        (("search", str(pair), "--limit", "0"), "limit must be at least 1, got 0"),
        (("search", str(pair), "--beam", "-2"), "beam must be at least 1, got -2"),
        (("search", str(pair), "--length", "99999"), "length must be at most 8,191"),
        (("search", str(pair), "--out", str(pair)), "is not empty; choose a new or an empty folder"),
    ):
        result = stabilitykit(*arguments)
        assert result.code == 2, arguments
        assert said in result.err
        assert "Traceback" not in result.err
