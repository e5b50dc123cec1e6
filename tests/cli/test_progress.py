"""In a pipe every command that takes its time says what it is at: on standard error, a line a stage."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stabilitykit.cli import app, screen

Run = Callable[..., Any]
RANDOM = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512&context=64"
TRAINING = """
import torch
def make(dtype):
    model = torch.nn.Linear(4, 4).to(dtype)
    kwargs = {"input": torch.full((2, 4), 300.0, dtype=dtype)}
    return model, kwargs, lambda out: (out * out).sum(), torch.optim.SGD(model.parameters(), lr=1e-3)
"""

COMMANDS = {
    "profile": [RANDOM, "--prompt", "Hi"],
    "diagnose": [RANDOM, "--prompt", "Hi", "--stress", "65536"],
    "forecast": [RANDOM, "--prompt", "Hi"],
    "bound": [RANDOM],
    "search": [RANDOM, "--limit", "8", "--length", "1", "--no-bos"],
    "repair": [RANDOM, "--no-ranking"],
    "check": [RANDOM, "--prompts", "a.txt"],
    "reproduce": ["float16-overflow", "--checkpoint", RANDOM, "--rescale", "65536"],
    "sweep": [RANDOM, "--prompts", "a.txt", "--length", "2", "--dtype", "float16", "--no-report"],
    "report": ["swept"],
    "verify": ["repaired", "--proof"],
}


@pytest.fixture
def talkative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stabilitykit: Run) -> Run:
    """The command line as it is after two seconds, in a folder with a text."""
    monkeypatch.setattr(screen, "_LONG", -1.0)
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("Hello there")
    return stabilitykit


def test_every_command_is_here() -> None:
    assert {command.callback.__name__ for command in app.registered_commands if command.callback} == set(COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("verify", "report")])
def test_a_command_says_what_it_is_at(talkative: Run, command: str) -> None:
    ran = talkative(command, *COMMANDS[command])
    lines = ran.err.splitlines()
    assert ran.code == 0, ran.err
    assert lines
    assert all(re.fullmatch(r"\d+ s: .+", line) for line in lines)
    stages = [line.partition(": ")[2] for line in lines]
    assert len(stages) == len(set(stages))


@pytest.mark.slow
def test_what_reads_the_work_of_others_says_so_too(talkative: Run) -> None:
    assert talkative("sweep", *COMMANDS["sweep"], "--out", "swept").code == 0
    assert "drawing figures" in talkative("report", "swept").err
    pytest.importorskip("transformers")
    proved = f"{RANDOM.replace('gemma3-270m', 'gemma2-2b')}&kv_heads=2"
    assert talkative("repair", proved, "--no-ranking", "--proved", "--out", "repaired").code == 0
    assert "proving layers" in talkative("verify", "repaired", "--proof").err
    assert "checking" in talkative("verify", "repaired").err


def test_a_training_step_is_told_too(talkative: Run) -> None:
    Path("mine.py").write_text(TRAINING)
    ran = talkative("diagnose", "mine.py:make", "--backward")
    assert ran.code == 0
    stages = [line.partition(": ")[2] for line in ran.err.splitlines()]
    assert stages == ["recording the step in float16", "recording the step in float32", "trying changes"]


def test_a_stage_that_says_nothing_of_itself_is_told_when_its_time_has_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screen, "_LONG", 0.05)
    with screen.progress_bar() as progress:
        progress("tracing", 0, 1)
        said = threading.Event()
        monkeypatch.setattr(screen.messages, "print", lambda *args, **how: said.set())
        assert said.wait(30)
    time.sleep(0)  # nothing else is told of it
    assert capsys.readouterr().err == ""
