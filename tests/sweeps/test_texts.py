"""Files of prompts: a folder and a pattern stand for their texts, in the order of their names."""

from pathlib import Path

import pytest

from stabilitykit.errors import MisuseError
from stabilitykit.sweeps.texts import prompt_names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("texts/b.md", "texts/a.txt", "texts/.c.txt", "texts/d.json", "texts/deep/e.txt", "[x].txt", "none/f"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("prose", ["prose"]),
        ("text: @texts", ["text: @texts"]),
        ("@texts/a.txt", ["@texts/a.txt"]),
        ("@gone.txt", ["@gone.txt"]),  # whoever reads it says that it is none
        ("@texts", ["@texts/a.txt", "@texts/b.md"]),
        ("@texts/", ["@texts/a.txt", "@texts/b.md"]),
        ("@texts/*", ["@texts/a.txt", "@texts/b.md", "@texts/d.json"]),
        ("@texts/**/*.txt", ["@texts/a.txt", "@texts/deep/e.txt"]),
        ("@none/../texts/?.md", ["@none/../texts/b.md"]),
        ("@[x].txt", ["@[x].txt"]),  # a file of that name, and no pattern
    ],
)
def test_what_a_prompt_stands_for(folder: Path, name: str, found: list[str]) -> None:
    assert prompt_names(name, folder) == found


def test_an_absolute_pattern_stays_absolute(folder: Path) -> None:
    assert prompt_names(f"@{folder}/texts/*.md", Path("elsewhere")) == [f"@{folder}/texts/b.md"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("@none", "holds no prompt: a file that ends in .txt or .md"), ("@*.md", "'\\*.md' matches no file")],
)
def test_what_stands_for_nothing_is_refused(folder: Path, name: str, said: str) -> None:
    with pytest.raises(MisuseError, match=said):
        prompt_names(name, folder)
