"""A block that `stop_at_break` ended says so, and warns where statements of it did not run, and only there."""

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stabilitykit.errors import SkippedStatements
from stabilitykit.recorder import record
from stabilitykit.records import Recording

ONES = torch.ones(1, 4, dtype=torch.float16)


def overflowing() -> nn.Module:
    """Its first layer overflows, its second one shows it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    model[0].weight.data.fill_(60000.0)
    return model


def alone(model: nn.Module) -> Recording:
    with record(model, stop_at_break=True) as recording:
        model(ONES)
    return recording


def assigned(model: nn.Module) -> Recording:
    output = None
    with record(model, stop_at_break=True) as recording:
        output = model(ONES)
    assert output is None
    return recording


def followed(model: nn.Module) -> Recording:
    seen = many = 0
    with record(model, stop_at_break=True) as recording:
        with torch.no_grad():
            model(ONES)
        print("done")
        seen, many = 1, 2
    assert (seen, many) == (0, 0)
    return recording


def looped(model: nn.Module) -> Recording:
    with record(model, stop_at_break=True) as recording:
        for _ in range(2):
            model(ONES)
    return recording


def inside(model: nn.Module) -> Recording:
    with record(model, stop_at_break=True) as recording:
        print(model(ONES))
    return recording


def by_another(model: nn.Module) -> Recording:
    def call() -> Tensor:
        output: Tensor = model(ONES)
        return output

    with record(model, stop_at_break=True) as recording:
        call()
    return recording


def renamed(model: nn.Module) -> Recording:
    around = record(model, stop_at_break=True)
    with around as recording:
        model(ONES)
    return recording


SILENT = [alone, by_another]
SAID = [
    (assigned, "1 statement in it did not run to the end, `output` was not assigned"),
    (followed, "2 statements in it did not run to the end, `seen` and `many` were not assigned"),
    (looped, "the rest of the loop did not run"),
    (inside, "1 statement in it did not run to the end"),
    (renamed, "what follows there did not run"),
]


@pytest.mark.parametrize("block", SILENT)
def test_a_call_that_stands_alone_leaves_nothing_out(block: Callable[[nn.Module], Recording]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recording = block(overflowing())
    assert recording.stopped
    assert recording.first_break() is not None


@pytest.mark.parametrize(("block", "said"), SAID, ids=[block.__name__ for block, _ in SAID])
def test_what_did_not_run_is_said(block: Callable[[nn.Module], Recording], said: str) -> None:
    model = overflowing()
    with pytest.warns(SkippedStatements) as warned:
        recording = block(model)
    assert recording.stopped
    (warning,) = warned
    assert warning.filename == __file__
    where, _, what = str(warning.message).partition(", as stop_at_break asks: ")
    assert where.startswith("The recorded block ended at its first break, at test_stopped.py:")
    assert what == f"{said}. `recording.stopped` is True."


def test_a_block_that_ran_to_its_end_was_not_stopped(tmp_path: Path) -> None:
    model = nn.Linear(4, 4).half()
    with record(model, stop_at_break=True) as recording:
        output = model(ONES)
    assert output.isfinite().all()
    assert not recording.stopped
    breaks = overflowing()
    with record(breaks) as broken:
        breaks(ONES)
    assert broken.first_break() is not None
    assert not broken.stopped

    ended = alone(overflowing())
    ended.save(tmp_path / "run.parquet")
    assert Recording.load(tmp_path / "run.parquet").stopped


def test_code_without_a_source_is_told_less() -> None:
    script = textwrap.dedent(
        """
        import torch, stabilitykit as sk
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).half()
        model[0].weight.data.fill_(60000.0)
        with sk.record(model, stop_at_break=True) as recording:
            output = model(torch.ones(1, 4).half())
        print(recording.stopped)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert "SkippedStatements: The recorded block ended at its first break, at <string>:6" in done.stderr
