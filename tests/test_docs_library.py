"""docs/library.md: every public name has a place in it, and every example runs, in a folder of its own."""

import re
from pathlib import Path

import pytest
from test_package import ROOT

import stabilitykit

PAGE = ROOT / "docs" / "library.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
EXAMPLES = [
    (section.partition("\n")[0], number, body)
    for section in SECTIONS
    for number, body in enumerate(re.findall(r"^```python run\n(.*?)^```$", section, re.DOTALL | re.MULTILINE))
]


@pytest.mark.parametrize(("section", "number", "body"), EXAMPLES, ids=[f"{name}-{n}" for name, n, _ in EXAMPLES])
def test_an_example_runs(section: str, number: int, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(body, f"docs/library.md, {section}", "exec"), {})


def test_every_public_name_is_in_an_example() -> None:
    used = set(re.findall(r"\bsk\.(\w+)", "".join(body for _, _, body in EXAMPLES)))
    assert set(stabilitykit.__all__) - used == {"__version__", "verify"}  # verify takes long; its docstring runs it
    assert "verify(" in PAGE.read_text()


def test_every_public_name_has_a_heading() -> None:
    headings = {word for section in SECTIONS for word in re.findall(r"\w+", section.partition("\n")[0])}
    assert set(stabilitykit.__all__) - {"Sampling", "Where", "__version__"} <= headings


def test_every_block_of_python_is_run() -> None:
    assert PAGE.read_text().count("```python") == len(EXAMPLES)
