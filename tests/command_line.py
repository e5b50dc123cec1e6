"""The command line, run in this process: its exit code, its standard output and its standard error."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from stabilitykit.cli import main, screen


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def stabilitykit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    monkeypatch.setattr(screen, "_LONG", math.inf)  # a line on standard error would depend on how fast a machine is

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["stabilitykit", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        seen = capsys.readouterr()
        return Result(code, seen.out, seen.err)

    return run
