"""docs/first-hour.md: what is typed there does what it says, on a small Llama and a small Gemma."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Result
from own_models import own_gemma, own_llama
from test_docs import DOCS, blocks_of, is_shown_by, shown, typed

PAGE = DOCS / "first-hour.md"
TEXTS = {
    "fable": "What now, said the fox to the crow.",
    "code": "for i in range(9): print(i)",
    "letter": "Dear Ann, thank you for the long letter that you sent.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own")
    own_llama(made / "my-llama")
    own_gemma(made / "my-gemma")
    (made / "prompt.txt").write_text("Hello world")
    (made / "texts").mkdir()
    for name, text in TEXTS.items():
        (made / "texts" / f"{name}.txt").write_text(text)
    return made


TASKS = {
    section.partition("\n")[0]: found
    for section in PAGE.read_text().split("\n## ")[1:]
    if (found := blocks_of(section))
}
"""The sections by their headings, with their blocks, but for that of the notebook, which has a test of its own."""


def test_each_of_the_eight_tasks_is_there() -> None:
    assert len(TASKS) == 7
    assert "(notebook.ipynb)" in PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("task", "own"), TASKS.items(), ids=list(TASKS))
def test_a_task_ends_as_the_page_shows(
    task: str,
    own: list[tuple[str, str]],
    folder: Path,
    stabilitykit: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    for info, body in own:
        language, _, code = info.partition(" own")
        if language == "console":
            results = [stabilitykit(*shown(command)) for command in typed(body)]
            assert {result.code for result in results} == {int(code or 0)}, [result.err for result in results]
            output = "".join(f"$ {line}\n{result.out}" for line, result in zip(typed(body), results, strict=True))
        else:
            exec(compile(body, task, "exec"), {"__name__": task})
            output = capsys.readouterr().out
            body = "\n".join(re.findall(r"print\(.*# (.*)", body))
        missing = is_shown_by(body, output)
        assert missing is None, f"the page shows\n{missing}\nand what is printed is\n{output}"
