"""docs/notebook.ipynb: executed again by a kernel of its own, it prints what it shows.

python tests/test_docs_notebook.py   executes it, and writes its outputs into it
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason='needs pip install "stabilitykit[dev]"')
nbclient = pytest.importorskip("nbclient", reason='needs pip install "stabilitykit[dev]"')

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def executed(folder: Path) -> Any:
    """The notebook as a fresh kernel in `folder` runs it; raises where a cell does."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    return notebook


def normal(text: str) -> str:
    """Digits are alike, and so is any white space: the last bits are a processor's own."""
    return " ".join(re.sub(r"-?\d[\d,.]*(e[+-]?\d+)?", "#", text).split())


def outputs(notebook: Any) -> list[list[str]]:
    """Of each cell of code what it prints and shows as text; of a picture that there is one."""
    shown = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts = [f"{one.name}: {normal(one.text)}" for one in cell.outputs if one.output_type == "stream"]
            for data in (one.data for one in cell.outputs if one.output_type in ("execute_result", "display_data")):
                texts += [kind for kind in data if kind.startswith("image/")]
                texts += [normal(data[kind]) for kind in ("text/plain", "text/html") if kind in data]
            shown.append(texts)
    return shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jupyter's, about itself
def test_the_notebook_shows_what_it_prints(tmp_path: Path) -> None:
    kept = nbformat.read(NOTEBOOK, as_version=4)
    again = executed(tmp_path)
    assert [cell.source for cell in again.cells] == [cell.source for cell in kept.cells]
    assert outputs(again) == outputs(kept)
    assert not [text for texts in outputs(kept) for text in texts if text.startswith("stderr")]


def test_the_notebook_is_whole_small_and_of_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in texts for texts in outputs(notebook)) == 3
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", text)
    absolute = r"(?<![\w.:/<])/[\w.-]+/\w"  # a path of whatever machine
    assert not re.search(
        rf"/home/|/root|/tmp/|{absolute}|0x[0-9a-f]{{6}}|\d+(\.\d+)? ?(ms|seconds)\b", without_pictures
    )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = executed(Path(folder))
    made.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(made, NOTEBOOK)
