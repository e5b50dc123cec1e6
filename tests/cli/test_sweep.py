"""`sweep`: each case once, failures told, a folder for one experiment alone, and mistakes refused in a sentence."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stabilitykit.records.sweep import Case, Results
from stabilitykit.sweeps.sweep import sweep

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no signals and no file locks on Windows")

Run = Callable[..., Any]
TINY = (
    "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&query_scalar=16"
    "&vocabulary=512&window=4&global_every=2&context=64"
)
EXPERIMENT = f"""title = "Tiny"
checkpoint = "{TINY}"
[[grid]]
length = ["1..4", 4]
dtype = ["float32", "float16"]
rescale = 16384.0
[[footprint]]
length = 8
[lengths]
checks = [2]
[report]
sections = ["verdict", "lengths", "chain", "provenance"]
"""


@pytest.fixture(autouse=True)
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is written here strikes in processes that run cases; see faults/sitecustomize.py."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads cost more than they give with so few numbers
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "faults"), prepend=os.pathsep)
    monkeypatch.setenv("FAULTS", str(tmp_path / "faults"))
    (tmp_path / "faults").touch()
    return tmp_path / "faults"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished sweep: the experiment's file, its results in the folder `out` beside it, and what was printed."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "tiny.toml").write_text(EXPERIMENT)
    command = [sys.executable, "-m", "stabilitykit", "sweep", "tiny.toml", "--out", "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return folder / "tiny.toml", subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def finished(swept: tuple[Path, Any], tmp_path: Path) -> tuple[str, str, Path]:
    """A copy of it: the experiment's file and the folder, as arguments; the folder."""
    shutil.copytree(swept[0].parent, tmp_path / "swept")
    folder = tmp_path / "swept" / "out"
    return str(tmp_path / "swept" / "tiny.toml"), str(folder), folder


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file in it, and when it was last written."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def records(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return contents(folder / "records")


def refused(result: Any) -> str:
    """What the command line says to a mistake: one sentence or two on standard error, and nothing else."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("stabilitykit: ")
    assert result.err.count("\n") == 1
    return str(result.err)


@pytest.mark.slow
def test_a_sweep_runs_every_case_and_says_what_came_of_it(swept: tuple[Path, Any]) -> None:
    path, done = swept
    assert done.returncode == 0
    assert all(re.fullmatch(r"\d+ s: .+", line) for line in done.stderr.splitlines())
    results = Results.open(path.parent / "out")
    assert (results.failed(), results.missing()) == ([], [])
    assert len(results.plan.cases) == 5
    said = " ".join(done.stdout.split())
    assert "What 4 finished cases of 4 come to." in said
    assert "float16 breaks in layer 0" in said
    assert "Records: out/records" in said
    assert "Report: out/report.html" in said


@pytest.mark.slow
def test_a_report_links_to_nothing_that_is_not_there(swept: tuple[Path, Any]) -> None:
    folder = swept[0].parent / "out"
    text = (folder / "report.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {link.partition("/")[0] for link in links} >= {"figures", "tables", "#verdict", "#provenance"}
    for link in links:
        if link.startswith("#"):
            assert f'<a id="{link[1:]}">' in text
        else:
            assert (folder / link).stat().st_size > 0, link


@pytest.mark.slow
def test_the_same_command_again_runs_nothing(stabilitykit: Run, faults: Path, finished: Any) -> None:
    experiment, out, folder = finished
    faults.write_text("full-disk 1")
    before = records(folder)
    again = stabilitykit("sweep", experiment, "--out", out, "--no-report", "--json")
    assert again.code == 0
    assert json.loads(again.out) == {"folder": out, "done": 5, "failed": {}, "skipped": []}
    assert records(folder) == before
    assert faults.read_text() == "full-disk 1"  # nothing was there for it to strike


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux heeds RLIMIT_DATA")
def test_cases_that_raise_run_out_of_memory_or_are_killed_fail_alone_and_run_again_when_asked_to(
    stabilitykit: Run, faults: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_LIMIT", str(2 << 30))  # the logits of 9,000 tokens take 3.6 GB
    path = tmp_path / "tiny.toml"
    path.write_text(
        f"""checkpoint = "{TINY.replace("context=64", "context=20000").replace("vocabulary=512", "vocabulary=100000")}"
        [[grid]]
        prompt = "repeat: x"
        length = [4, 9000, 5]
        dtype = "float32"
        level = "layers"
        [[footprint]]
        length = [8, 16]
        [report]
        sections = ["verdict"]
        """
    )
    command = ("sweep", str(path), "--out", str(tmp_path / "out"))
    faults.write_text("full-disk 1\nhalf 2")
    first = stabilitykit(*command)
    assert first.code == 1
    assert faults.read_text() == ""
    results = Results.open(tmp_path / "out")
    failures = {case.settings["length"]: failure for case, failure in results.failed()}
    assert {length: failure.kind for length, failure in failures.items()} == {
        4: "raised",
        9000: "out of memory",
        5: "killed",
    }
    assert failures[4].reason.startswith("MisuseError: ")
    assert "No space left on device" in failures[4].reason
    assert "can't allocate memory" in failures[9000].reason
    assert failures[5].reason == (
        "the process was ended by SIGKILL, which is how the system ends a process when memory runs out"
    )
    assert results.missing() == []
    assert len(list(results.footprints())) == 2
    said = " ".join(first.out.split())
    for failure in failures.values():
        assert failure.reason[:60] in said
    assert "Not included: of 3 cases, 3 failed (killed, out of memory and raised), in float32." in said

    before = records(tmp_path / "out")
    again = stabilitykit(*command, "--no-report", "--json")
    assert again.code == 1
    assert json.loads(again.out)["failed"] == {case.id: failure.reason for case, failure in results.failed()}
    assert records(tmp_path / "out") == before

    assert stabilitykit(*command, "--no-report", "--retry-failed").code == 1
    assert [(case.settings["length"], failure.kind) for case, failure in results.failed()] == [(9000, "out of memory")]
    assert len(list(results.runs())) == 2
    after = records(tmp_path / "out")
    assert {path for path in before if before[path] != after.get(path)} == {
        path for path in before if path.name.endswith(".failed.json")
    }
    assert not [path for path in after if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("override", "differs"),
    [
        ("rescale=1.0", "4 cases added and 4 removed"),
        ("length=4", "0 cases added and 2 removed"),
        (f"checkpoint={TINY}&seed=1", r"the checkpoint was random:\S+&seed=0 and is random:\S+&seed=1; .* SHA-256 was"),
    ],
)
def test_a_folder_of_another_experiment_is_refused_and_left_as_it_is(
    stabilitykit: Run, finished: Any, override: str, differs: str
) -> None:
    experiment, out, folder = finished
    before = contents(folder)
    said = refused(stabilitykit("sweep", experiment, "--out", out, "--set", override))
    assert re.search(differs, said)
    assert f"{out} holds the results of another experiment" in said
    assert "--out" in said
    assert contents(folder) == before


@pytest.mark.slow
def test_only_what_is_missing_runs_and_a_second_sweep_at_work_in_the_folder_is_refused(
    stabilitykit: Run, finished: Any
) -> None:
    experiment, out, folder = finished
    before = records(folder)
    lost = next(path for path in before if path.name.startswith("lengths"))
    lost.unlink()
    ran, answers = set(), []

    def watch(case: Case, _: Any) -> None:
        ran.add(case.id)
        answers.append(stabilitykit("sweep", experiment, "--out", out, "--no-report"))

    sweep(Results.open(folder), folder.parent, watch=watch)
    assert ran == {lost.stem}
    for answer in answers:
        assert f"another is at work in {out}" in refused(answer)
    after = records(folder)
    assert after[lost][1] == before[lost][1]
    assert after | {lost: before[lost]} == before
    assert stabilitykit("sweep", experiment, "--out", out, "--no-report").code == 0


def test_a_dry_run_says_what_would_run_and_leaves_nothing(
    stabilitykit: Run, tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(EXPERIMENT)
    before = contents(tmp_path)
    told = stabilitykit("sweep", "tiny.toml", "--dry-run")
    assert (told.code, told.err) == (0, "")
    assert "Tiny: 5 cases" in told.out
    Path("one.toml").write_text(f'title = "One"\ncheckpoint = "{TINY}"\n[[footprint]]\nlength = 8\n')
    assert "One: 1 case\n" in stabilitykit("sweep", "one.toml", "--dry-run").out
    Path("one.toml").unlink()
    found = stabilitykit("sweep", "tiny.toml", "--dry-run", "--json")
    assert (found.code, found.err) == (0, "")
    cases = json.loads(found.out)["cases"]
    assert [case["kind"] for case in cases] == ["run", "run", "lengths", "lengths", "footprint"]
    assert cases[0]["settings"]["tokens"] == 4
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.toml", faults.name}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('title = "Tiny"', "title = ", ["not valid TOML", "line 1"]),
        ('title = "Tiny"', 'titel = "Tiny"', ["line 1: ", "unknown key 'titel'; choose one of: checkpoint, device,"]),
        (
            "rescale = 16384.0",
            "strain = 2.0",
            ["line 6: ", "unknown axis 'strain'; choose one of: bos, dtype,"],
        ),
        ("rescale = 16384.0", "rescale = 3.0", ["line 6: ", "a power of two from 2^-24 to 2^24; 3.0 is not"]),
        ('"float16"]', '"float61"]', ["line 5: ", "float32 or ", "'float61' is not"]),
        ('"1..4", 4', '"1..65"', ["line 4: ", "context of 64 tokens; the length 65 does not"]),
        ('"1..4", 4', '"all"', ["line 4: ", "context of 64 tokens"]),
        ("length = 8", "length = 9000", ["line 8: ", "context of 8,192 tokens; the length 9,000 does not"]),
        ("[[footprint]]", "[[footpoint]]", ["line 7: ", "unknown key 'footpoint'; choose one of: ", "footprint, grid"]),
        ('"verdict", "lengths"', '"verdict", "length"', ["line 12: ", "unknown section 'length'", "explore, lengths,"]),
        ("layers=2", "layers=two", ["layers of a random checkpoint must be a positive integer", "got 'two'"]),
        ("random:", "rndm:", ["rndm:"]),
    ],
)
def test_a_mistake_in_the_file_is_refused_with_its_place_and_what_is_allowed(
    stabilitykit: Run, tmp_path: Path, before: str, after: str, said: list[str]
) -> None:
    assert before in EXPERIMENT
    path = tmp_path / "tiny.toml"
    path.write_text(EXPERIMENT.replace(before, after))
    message = refused(stabilitykit("sweep", str(path), "--out", str(tmp_path / "out")))
    for part in said:
        assert part in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "dtipe=float16"), ["--set is KEY=VALUE", "prompt, length, bos, dtype,", "'dtipe=float16' is not"]),
        (("--set", "dtype"), ["--set is KEY=VALUE", "'dtype' is not"]),
        (("--set", "dtype=float61"), ["--set dtype=float61: dtype is float32 or", "'float61' is not"]),
        (("--set", "length=65"), ["context of 64 tokens; the length 65 does not"]),
        (("--set", "prompt=@gone.txt"), ["names a file to read", "gone.txt is none"]),
        (("--set", "device=gpu9"), ["'gpu9'"]),
    ],
)
def test_a_mistake_on_the_command_line_is_refused_with_what_is_allowed(
    stabilitykit: Run, tmp_path: Path, arguments: tuple[str, ...], said: list[str]
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(EXPERIMENT)
    message = refused(stabilitykit("sweep", str(path), "--out", str(tmp_path / "out"), *arguments))
    for part in said:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_none_is_refused(stabilitykit: Run, tmp_path: Path) -> None:
    assert "gone.toml cannot be read" in refused(stabilitykit("sweep", str(tmp_path / "gone.toml")))
    assert "ends in .toml; " in refused(stabilitykit("sweep", str(tmp_path)))
    assert "--init FILE" in refused(stabilitykit("sweep"))


@pytest.mark.slow
def test_a_checkpoint_is_swept_over_a_folder_of_texts_without_a_file(
    stabilitykit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my texts").mkdir()
    Path("my texts/long.txt").write_text("Hello there, world.")
    Path("my texts/short.md").write_text("Oh.")
    command = ("sweep", TINY, "--prompts", "my texts", "--dtype", "float16", "--length", "10", "--length", "up to 40")
    told = json.loads(stabilitykit(*command, "--json").out)
    short = {"prompt": "@my texts/short.md", "bos": True, "length": "10", "tokens": 4}
    assert told == {"folder": "reports/gemma3-270m", "done": 3, "failed": {}, "skipped": [short]}
    again = stabilitykit(*command)
    assert again.code == 0
    said = " ".join(again.out.split())
    assert "@my texts/short.md has 4 tokens with <bos>, so a run of 10 tokens is skipped." in said
    page = Path("reports/gemma3-270m/report.md").read_text()
    assert page.count("so a run of 10 tokens is skipped") == 1
    assert "Lengths that a text does not reach" in page
    dry = stabilitykit(*command, "--dry-run")
    assert "so a run of 10 tokens is skipped." in dry.out
    assert json.loads(stabilitykit(*command, "--dry-run", "--json").out)["skipped"] == [short]


def test_init_writes_a_file_that_plans_what_would_run_and_overwrites_none(stabilitykit: Run, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Hello there, world.")
    path, texts = tmp_path / "sub folder" / "mine.toml", str(tmp_path / "texts")
    options = ("--prompts", texts, "--dtype", "float16", "--length", "1..8", "--length", "8")
    told = stabilitykit("sweep", TINY, "--init", str(path), *options)
    assert (told.code, told.err) == (0, "")
    assert f"To run it: stabilitykit sweep '{path}'" in told.out
    cases = [
        [
            one["settings"] | {"prompt": ""}
            for one in json.loads(stabilitykit(*command, "--dry-run", "--json").out)["cases"]
        ]
        for command in (("sweep", str(path)), ("sweep", TINY, *options))
    ]
    assert cases[0] == cases[1]
    assert len(cases[0]) == 2
    before = path.read_bytes()
    assert "exists already" in refused(stabilitykit("sweep", TINY, "--init", str(path)))
    assert path.read_bytes() == before
    assert "ends in .toml" in refused(stabilitykit("sweep", "--init", str(tmp_path / "mine")))
    assert "--set dtype=float16" in refused(stabilitykit("sweep", str(path), "--dtype", "float16"))
