"""What the repository brings for CI: the GitHub action and the pre-commit hook do what their pages say."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from gate.models import TINY, gemma, spoilt
from junitparser import JUnitXml
from pre_commit.clientlib import load_manifest
from test_package import ROOT

ACTION = ROOT / "docs" / "ci" / "action.yml"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which `stabilitykit` is this package."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "stabilitykit"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m stabilitykit "$@"\n')
    script.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_the_action_leaves_its_reports_whether_the_check_holds_or_not(
    environment: dict[str, str], tmp_path: Path
) -> None:
    action: Any = yaml.safe_load(ACTION.read_text())
    assert action["runs"]["using"] == "composite"
    step = action["runs"]["steps"][-1]
    for arguments, code in (("--no-bos\n", 0), ("--stress=65536\n--no-bos\n", 1), ("--max-kl=-1", 2)):
        given = {"checkpoint": TINY, "arguments": arguments, "reports": str(tmp_path / "reports; touch x")}
        inputs = {name: given.get(name, what.get("default", "")) for name, what in action["inputs"].items()}
        filled = {
            name: inputs[value.removeprefix("${{ inputs.").removesuffix(" }}")] for name, value in step["env"].items()
        }
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", step["run"]], env=environment | filled, cwd=tmp_path, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        reports = [tmp_path / "reports; touch x" / name for name in ("check.junit.xml", "check.sarif")]
        assert [path.exists() for path in reports] == [code != 2] * 2  # nothing was judged: an older report is none
        if code != 2:
            assert bool(JUnitXml.fromfile(str(reports[0])).failures) == (code == 1)
    assert not (tmp_path / "x").exists()


def test_the_action_installs_the_package_that_it_is_part_of() -> None:
    action: Any = yaml.safe_load(ACTION.read_text())
    (install,) = (step for step in action["runs"]["steps"] if "pip install" in step.get("run", ""))
    assert "$GITHUB_ACTION_PATH/../..[hf]" in install["run"]
    assert (ACTION.parent / ".." / ".." / "pyproject.toml").resolve() == ROOT / "pyproject.toml"
    assert not any("${{" in step.get("run", "") for step in action["runs"]["steps"])  # nothing is pasted into a script


@pytest.mark.slow
def test_the_hook_checks_a_folders_weights(environment: dict[str, str], tmp_path: Path) -> None:
    (hook,) = load_manifest(str(ROOT / ".pre-commit-hooks.yaml"))
    assert (hook["id"], hook["pass_filenames"], hook["language"]) == ("stabilitykit-check-weights", False, "python")
    folder = gemma(tmp_path / "gemma")
    codes = []
    for _ in range(2):
        command = [*shlex.split(hook["entry"]), str(folder), "--dtype", "float16"]
        codes.append(subprocess.run(command, env=environment, capture_output=True, check=False).returncode)
        spoilt(folder, "model.norm.weight", float("inf"))
    assert codes == [0, 1]
