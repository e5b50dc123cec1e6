"""What holds for every command: how it ends, and what its help says."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from stabilitykit.cli import app

GROUP = typer.main.get_command(app)
assert isinstance(GROUP, TyperGroup)
OPTIONS = [(name, option) for name, command in GROUP.commands.items() for option in command.params]


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that waits for its prompt, which nobody writes."""
    os.mkfifo(tmp_path / "prompt")
    command = [sys.executable, "-m", "stabilitykit", "profile", "random:gemma3-270m", "--prompt"]
    with subprocess.Popen(
        [*command, f"@{tmp_path / 'prompt'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="no signals and no pipes with names on Windows")
def test_ctrl_c_ends_with_130_and_no_traceback(stuck: subprocess.Popen[str], tmp_path: Path) -> None:
    writing = None
    while writing is None and stuck.poll() is None:
        try:  # opening the other end fails until the command reads
            writing = os.open(tmp_path / "prompt", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.1)
    assert writing is not None
    stuck.send_signal(signal.SIGINT)
    out, err = stuck.communicate(timeout=60)
    os.close(writing)
    assert (stuck.returncode, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=[f"{name} {option.name}" for name, option in OPTIONS])
def test_every_option_says_what_it_does(command: str, option: typer.core.TyperOption) -> None:
    text = option.help or ""
    assert re.fullmatch(r"[A-Za-z].{14,}\.", text, re.DOTALL), f"{command} {option.name}: {text!r}"
    for unsaid in ("moments of rounding", "Of the", "whose end", "none of them"):
        assert unsaid not in text
