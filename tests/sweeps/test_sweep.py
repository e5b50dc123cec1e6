"""What a sweep survives: kills at any moment, and every case that fails; what is finished is never touched again."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stabilitykit.errors import MisuseError
from stabilitykit.files import write_bytes
from stabilitykit.records.sweep import Results
from stabilitykit.sweeps.file import read_experiment
from stabilitykit.sweeps.model import open_swept
from stabilitykit.sweeps.plan import make_plan
from stabilitykit.sweeps.sweep import sweep
from stabilitykit.sweeps.worker import failure_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no signals and no file locks on Windows")

FAULTS = str(Path(__file__).parents[1] / "faults")
TINY = (
    "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&query_scalar=16"
    "&vocabulary=512&window=4&global_every=2&context=64"
)

# Every kind of file that a case leaves; in float16 some break. A run in 16 bits compares itself with a float32 run
# that is finished by then: resumed, it has to make that anew.
EXPERIMENT = f"""checkpoint = "{TINY}"
[[grid]]
length = 4
dtype = ["float32", "float16"]
rescale = 16384.0
[[grid]]
prompt = ["prose", "digits"]
length = 4
level = "layers"
dtype = ["float16", "bfloat16"]
[[grid]]
length = "1..4"
dtype = ["float16", "bfloat16"]
rescale = 16384.0
[[footprint]]
length = [8, 16, 24, 32]
"""

# FOLDER, then perhaps --retry-failed; or FINISHED VICTIM, to kill "all" of the process group, or the sweep "alone", in
# the middle of the case that comes after so many finished ones.
SWEEP = """
import os, signal, sys
from pathlib import Path
from stabilitykit.sweeps.sweep import sweep
from stabilitykit.records.sweep import Results

folder, *more = sys.argv[1:]
left, victim = (int(more[0]), more[1]) if len(more) == 2 else (-1, "")

def watch(case, message):
    global left
    left -= "finished" in message
    if left == 0 and "what" in message:
        (os.killpg if victim == "all" else os.kill)(os.getpid(), signal.SIGKILL)

sweep(Results.open(Path(folder)), Path(folder), watch=watch, retry_failed=more == ["--retry-failed"])
"""


def planned(folder: Path, experiment: str = EXPERIMENT) -> Results:
    """A folder in which nothing has run yet."""
    path = folder.with_suffix(".toml")
    path.write_text(experiment)
    read = read_experiment(path)
    return Results.create(folder, make_plan(read, open_swept(read.checkpoint), command="stabilitykit sweep"))


def records(results: Results) -> dict[str, bytes]:
    """Every file that is in records/ under its own name."""
    paths = (results.folder / "records").glob("[!.]*")
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The records of a sweep that nothing happened to."""
    results = planned(tmp_path_factory.mktemp("undisturbed") / "sweep")
    assert Victim(results, {}).run() == 0
    assert set(records(results)) == {results.path(case).name for case in results.plan.cases}
    return records(results)


@dataclass(frozen=True)
class Victim:
    """A sweep that is killed and started again, in processes of its own, where faults/sitecustomize.py is at work."""

    results: Results
    undisturbed: dict[str, bytes]

    def run(self, *arguments: str) -> int:
        """The status of a sweep, once nothing of it is left: the process that runs cases holds its stderr too."""
        self.faults.touch()
        environment = os.environ | {
            "FAULTS": str(self.faults),
            "PYTHONPATH": os.pathsep.join([FAULTS, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",  # threads cost more than they give with so few numbers
        }
        command = [sys.executable, "-c", SWEEP, str(self.results.folder), *arguments]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, start_new_session=True, timeout=120)
        return done.returncode

    def survivors(self, lost: int = 0) -> int:
        """How many results are there, each of them whole; `lost` cases are recorded as killed."""
        found = records(self.results)
        failures = [name for name in found if name.endswith(".failed.json")]
        assert [failure.kind for _, failure in self.results.failed()] == ["killed"] * lost
        assert len(failures) == lost
        assert all(found[name] == self.undisturbed[name] for name in found if name not in failures)
        return len(found) - lost

    def kill_running(self, finished: int, victim: str) -> None:
        before = self.survivors()
        assert self.run(str(finished), victim) == -signal.SIGKILL
        assert self.survivors() >= before + finished

    def kill_writing(self, moment: str, count: int) -> None:
        before = self.survivors()
        self.faults.write_text(f"all-{moment} {count}")
        assert self.run() == -signal.SIGKILL
        assert self.faults.read_text() == ""
        is_renamed = moment == "renamed"
        assert self.survivors() == before + count - 1 + is_renamed
        assert len(self.left_over) == (not is_renamed)

    @property
    def faults(self) -> Path:
        return self.results.folder / "faults"

    @property
    def left_over(self) -> list[Path]:
        return list((self.results.folder / "records").glob(".*"))


def kill_whole_sweeps(victim: Victim) -> None:
    victim.kill_running(0, "all")
    victim.kill_writing("begun", 1)
    victim.kill_writing("half", 2)
    victim.kill_writing("renamed", 3)
    victim.kill_running(2, "alone")
    assert victim.run() == 0


def kill_what_runs_cases_too(victim: Victim) -> None:
    victim.kill_running(1, "all")
    victim.kill_writing("written", 2)
    # The process that runs cases, three times: its case is lost, unless it was done, and the rest goes on.
    victim.faults.write_text("half 1\nwritten 2\nrenamed 1")
    assert victim.run() == 0
    assert victim.faults.read_text() == ""
    assert victim.left_over == []
    assert victim.survivors(lost=2) == len(victim.undisturbed) - 2
    assert victim.run("--retry-failed") == 0


@pytest.mark.slow
def test_sweeps_killed_ten_times_leave_the_records_of_an_undisturbed_one(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """Two sweeps, killed five times each, at the same time."""
    victims = [Victim(planned(tmp_path / name), undisturbed) for name in ("whole", "cases")]
    with ThreadPoolExecutor() as pool:
        stories = zip((kill_whole_sweeps, kill_what_runs_cases_too), victims, strict=True)
        for story in [pool.submit(story, victim) for story, victim in stories]:
            story.result()
    for victim in victims:
        assert records(victim.results) == undisturbed
        assert victim.left_over == []
        assert (victim.results.failed(), victim.results.missing()) == ([], [])


@pytest.mark.slow
def test_a_finished_sweep_runs_nothing_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    results = planned(tmp_path / "sweep")
    for name, content in undisturbed.items():
        write_bytes(results.folder / "records" / name, content)
    before = {path: path.stat().st_mtime_ns for path in (results.folder / "records").iterdir()}
    told: list[Any] = []
    sweep(results, results.folder, watch=lambda *message: told.append(message), retry_failed=True)
    assert told == []
    assert {path: path.stat().st_mtime_ns for path in (results.folder / "records").iterdir()} == before


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (MemoryError(), "out of memory", "MemoryError: no message"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory.\nmore"), "out of memory", "OutOfMemoryError: CUDA out of"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried"), "out of memory", "RuntimeError: [enforce"),
        (RuntimeError("mat1 and mat2\nmore"), "raised", "RuntimeError: mat1 and mat2"),
        (MisuseError("A prompt is"), "raised", "MisuseError: A prompt is"),
    ],
)
def test_what_is_recorded_of_an_error(error: Exception, kind: str, reason: str) -> None:
    failure = failure_of(error)
    assert failure.kind == kind
    assert failure.reason.startswith(reason)
    assert "more" not in failure.reason
