"""Batch files: prompts and chats, a line each, and how they are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from stabilitykit.errors import MisuseError
from stabilitykit.run.batch import Asked, read_batch


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "batch.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_prompts_and_chats_are_read_a_line_each(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    path = written(tmp_path, {"prompt": "one\u2028line"}, "", {"messages": turns}, {"messages": turns[1:2]})
    assert read_batch(path) == [
        Asked(text="one\u2028line"),
        Asked(text="c", chat=True, system="s", earlier=(("a", "b"),)),
        Asked(text="a", chat=True),
    ]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", r"batch\.jsonl:1 is not JSON"),
        ("[1]", "either a prompt or messages"),
        ({"text": "x"}, "either a prompt or messages"),
        ({"prompt": ""}, "at least one character"),
        ({"prompt": 3}, "at least one character"),
        ({"messages": "x"}, "a list of objects"),
        ({"messages": [{"role": "user"}]}, "a list of objects"),
        ({"messages": []}, "got none"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "got model"),
    ],
)
def test_a_line_of_another_form_is_refused_with_its_number(tmp_path: Path, line: Any, told: str) -> None:
    with pytest.raises(MisuseError, match=told):
        read_batch(written(tmp_path, line))


def test_a_file_without_a_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="holds no prompt"):
        read_batch(written(tmp_path, "", ""))
