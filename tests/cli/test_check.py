"""`stabilitykit check`: its exit codes, what it prints and what it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gate.models import TINY, gemma, spoilt

from stabilitykit.records.document import from_document, read_document
from stabilitykit.records.gate import Baseline, Gate

Run = Callable[..., Any]


def test_it_exits_with_0_1_and_2(stabilitykit: Run, tmp_path: Path) -> None:
    holds = stabilitykit("check", TINY)
    assert (holds.code, holds.err) == (0, "")
    assert "float16 holds on 3 prompts." in holds.out
    breaks = stabilitykit("check", TINY, "--stress", "65536")
    assert (breaks.code, breaks.err) == (1, "")
    said = " ".join(breaks.out.split())
    assert "float16 overflows in embedding, scaled (embed_tokens, operator mul)" in said
    assert "exceeds the float16 maximum, 65,504" in said
    assert "float16 does not hold: 1 violation, on 3 of 3 prompts." in said
    for wrong in (["nowhere"], [TINY, "--dtype", "int4"], [TINY, "--prompts", "gone.txt"], [TINY, "--max-kl", "-1"]):
        refused = stabilitykit("check", *wrong)
        assert refused.code == 2, wrong
        assert refused.err.startswith("stabilitykit: ")
        assert refused.out == ""


def test_what_cannot_be_judged_exits_with_2(stabilitykit: Run, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 100)
    assert stabilitykit("check", TINY, "--prompts", str(tmp_path / "long.txt")).code == 2


def test_the_document_is_read_back(stabilitykit: Run) -> None:
    done = stabilitykit("check", TINY, "--min-headroom", "13", "--json")
    document = json.loads(done.out)
    assert done.code == 1
    assert document["holds"] is False
    found = from_document(Gate, document)
    assert {one.limit for one in found.violations} == {"headroom"}
    assert found.command is not None
    assert found.command.startswith("stabilitykit check ")
    assert {"torch", "stabilitykit"} <= set(found.versions)


def test_nothing_is_overwritten_unless_asked_and_nothing_runs_before_that_is_known(
    stabilitykit: Run, tmp_path: Path
) -> None:
    for option in ("--junit", "--sarif", "--write-baseline"):
        path = tmp_path / f"{option}.out"
        path.write_text("mine")
        refused = stabilitykit("check", "nowhere", option, str(path))
        assert refused.code == 2
        assert "exists already" in refused.err
        assert path.read_text() == "mine"
        assert stabilitykit("check", TINY, option, str(path), "--overwrite").code == 0
        assert path.read_text() != "mine"
    assert stabilitykit("check", TINY, "--junit", str(tmp_path), "--overwrite").code == 2
    for option in ("--junit", "--sarif", "--write-baseline"):
        refused = stabilitykit("check", "nowhere", option, str(tmp_path / "--junit.out" / "sub" / "report"))
        assert refused.code == 2
        assert "is a file and no folder" in refused.err
    same = str(tmp_path / "one")
    assert "different names" in stabilitykit("check", TINY, "--junit", same, "--sarif", same).err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_report_that_cannot_be_written_whole_leaves_the_old_one(
    stabilitykit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the disk is full: bytes arrive, and then an error."""
    whole = Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        whole(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    for option in ("--junit", "--sarif", "--write-baseline"):
        path = tmp_path / "report"
        path.write_text("mine")
        refused = stabilitykit("check", TINY, option, str(path), "--overwrite")
        assert refused.code == 2
        assert "No space left" in refused.err
        assert path.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_of_many_violations_the_worst_are_shown_and_all_are_in_the_document(stabilitykit: Run) -> None:
    document = json.loads(stabilitykit("check", TINY, "--min-headroom", "99", "--json").out)
    every = len(document["violations"])
    assert every > 20
    shown = " ".join(stabilitykit("check", TINY, "--min-headroom", "99").out.split())
    assert shown.count("are asked for") == 5
    assert f"There are {every - 5} more violations of this limit (headroom)" in shown
    assert f"{every} violations, on " in shown


def test_a_name_in_the_models_code_is_never_capitalised_or_told_twice(stabilitykit: Run, tmp_path: Path) -> None:
    shown = stabilitykit("check", f"hf:{gemma(tmp_path / 'gemma')}", "--min-headroom", "99", "--json")
    unlabelled = [one for one in json.loads(shown.out)["violations"] if one["label"] in (None, one["site"])]
    assert unlabelled
    for one in unlabelled:
        assert one["text"].count(one["site"]) == 1


def test_a_baseline_is_written_of_what_holds_alone(stabilitykit: Run, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    failed = stabilitykit("check", TINY, "--stress", "65536", "--write-baseline", str(path))
    assert failed.code == 1
    assert "No baseline was written" in failed.out
    assert not path.exists()
    assert stabilitykit("check", TINY, "--write-baseline", str(path)).code == 0
    kept = read_document(path, Baseline, "a baseline")
    assert len(kept.headroom) > 30
    assert stabilitykit("check", TINY, "--baseline", str(path)).code == 0
    lost = stabilitykit("check", TINY, "--stress", "32", "--baseline", str(path))
    assert lost.code == 1
    assert "in the baseline: a loss of" in " ".join(lost.out.split())
    torch = kept.versions["torch"]
    path.write_text(path.read_text().replace(f'"torch": "{torch}"', '"torch": "1.0"'))
    told = " ".join(stabilitykit("check", TINY, "--stress", "32", "--baseline", str(path)).out.split())
    assert f"this has changed: torch (1.0, now {torch[:16]})" in told
    path.write_text("{}")
    assert stabilitykit("check", TINY, "--baseline", str(path)).code == 2


def test_weights_alone(stabilitykit: Run, tmp_path: Path) -> None:
    folder = gemma(tmp_path / "gemma")
    done = stabilitykit("check", str(folder), "--weights-only")
    assert (done.code, done.err) == (0, "")
    assert "The weights hold in float16. Nothing was run." in done.out
    spoilt(folder, "model.norm.weight", float("inf"))
    done = stabilitykit("check", str(folder), "--weights-only")
    assert done.code == 1
    assert "model.norm.weight[5] is inf" in done.out
    both = stabilitykit("check", str(folder), "--weights-only", "--write-baseline", str(tmp_path / "b.json"))
    assert both.code == 2


def test_the_chat_template_is_put_around_texts(stabilitykit: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hi")
    counts = []
    for options in ([], ["--chat"], ["--no-bos"]):
        done = stabilitykit("check", TINY, "--prompts", str(tmp_path / "a.txt"), "--json", *options)
        counts.append(json.loads(done.out)["prompts"][0]["tokens"])
    assert counts[1] > counts[0] == counts[2] + 1


def test_profile_exits_with_0_and_says_what_does_not(stabilitykit: Run) -> None:
    assert stabilitykit("profile", TINY, "--prompt", "Hi", "--stress", "65536").code == 0
    shown = stabilitykit("profile", "--help")
    assert "Exits 0 whatever was found" in " ".join(shown.out.split())
    assert "stabilitykit check" in shown.out


@pytest.mark.parametrize("option", ["--no-bos", "--stream"])
def test_options_of_the_model_reach_it(stabilitykit: Run, option: str) -> None:
    assert stabilitykit("check", TINY, option).code == 0
