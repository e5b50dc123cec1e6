"""A section that an experiment brings along: drawn by its name, refused where it is gone or is another."""

import subprocess
import sys
from pathlib import Path

import pytest
from swept import clean_run, run_case, sweep

from stabilitykit.errors import MisuseError
from stabilitykit.report.blocks import Prose
from stabilitykit.report.sections import section, shown
from stabilitykit.sweeps.file import read_experiment

OWN = """
from stabilitykit.report.blocks import Prose, Section
from .words import greeting

def section(results):
    return Section(key="own", title="Own", opening="Mine.", blocks=[Prose(f"{greeting} {results.plan.name}")])
"""

TOML = """
checkpoint = "random:gemma3-270m"
[[grid]]
dtype = "float16"
[report]
sections = ["verdict", "own.py"]
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    (tmp_path / "words.py").write_text('greeting = "Hello"')
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "mine.toml").write_text(TOML)
    return tmp_path / "mine.toml"


def swept(experiment: Path) -> dict[str, object]:
    """What a plan keeps of the sections of an experiment."""
    read = read_experiment(experiment, sections=("verdict",))
    return {"sections": read.sections, "own_sections": dict(read.own_sections)}


def test_it_is_drawn_among_the_others_and_imports_its_neighbours(experiment: Path) -> None:
    results = sweep(experiment.parent / "toy", [(run_case(), clean_run())], **swept(experiment))
    assert shown(results) == ["verdict", str(experiment.parent / "own.py")]
    (said,) = section(results, shown(results)[1]).blocks
    assert said == Prose("Hello toy")


def test_the_report_command_draws_it_again(experiment: Path) -> None:
    folder = experiment.parent / "toy"
    sweep(folder, [(run_case(), clean_run())], **swept(experiment))
    command = [sys.executable, "-m", "stabilitykit", "report", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    assert "Hello toy" in (folder / "report.md").read_text()
    (experiment.parent / "own.py").unlink()
    gone = subprocess.run(command, check=False, capture_output=True, text=True)
    assert gone.returncode == 2
    assert "Traceback" not in gone.stderr
    assert "which is not there" in " ".join(gone.stderr.split())


def test_one_that_has_changed_since_is_not_run(experiment: Path) -> None:
    results = sweep(experiment.parent / "toy", [], **swept(experiment))
    (experiment.parent / "own.py").write_text("raise AssertionError('never run')")
    with pytest.raises(MisuseError, match="has changed since the sweep"):
        section(results, shown(results)[1])


def test_one_without_the_function_is_refused(experiment: Path) -> None:
    (experiment.parent / "own.py").write_text("sections = 1")
    results = sweep(experiment.parent / "toy", [], **swept(experiment))
    with pytest.raises(MisuseError, match=r"defines section\(results\)"):
        section(results, shown(results)[1])


def test_only_files_that_are_there_can_be_named(experiment: Path) -> None:
    (experiment.parent / "own.py").unlink()
    with pytest.raises(MisuseError, match=r"line 6: cannot read the section own.py"):
        read_experiment(experiment, sections=("verdict",))
    experiment.write_text(TOML.replace("own.py", "own"))
    with pytest.raises(MisuseError, match="unknown section 'own'; choose one of: verdict, or a Python file"):
        read_experiment(experiment, sections=("verdict",))


def test_the_format_in_question_is_one_there_is(experiment: Path) -> None:
    experiment.write_text(TOML + 'format = "bfloat16"\n')
    assert read_experiment(experiment).format == "bfloat16"
    experiment.write_text(TOML + 'format = "int8"\n')
    with pytest.raises(MisuseError, match="line 7: unknown number format 'int8'; choose one of: float64, "):
        read_experiment(experiment)
