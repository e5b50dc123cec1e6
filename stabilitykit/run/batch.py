"""Several prompts from one file: JSON Lines, a prompt or a chat on each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabilitykit.errors import MisuseError
from stabilitykit.run.prompts import read_text

_FORM = 'Write {"prompt": "..."}, or {"messages": [{"role": "user", "content": "..."}]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A text to continue or, of a `chat`, the last that the user said, with what was said before it."""

    text: str
    chat: bool = False
    system: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()


def read_batch(path: Path) -> list[Asked]:
    """The prompts in a JSON Lines file, empty lines left out.

    Raises MisuseError, with the number of the line, for a file without a prompt and for a line of another form.
    """
    lines = enumerate(read_text(path, "A batch").split("\n"), start=1)
    asked = [_of_line(f"{path}:{number}", line) for number, line in lines if line.strip()]
    if not asked:
        raise MisuseError(f"{path} holds no prompt. {_FORM} on each line.")
    return asked


def _of_line(place: str, line: str) -> Asked:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MisuseError(f"{place} is not JSON: {error}. {_FORM} on each line.") from None
    return of_object(place, said)


def of_object(place: str, said: Any) -> Asked:
    """The prompt, or the chat, of one JSON object. Raises MisuseError, with the `place` of it, for another form."""
    if not isinstance(said, Mapping) or ("prompt" in said) == ("messages" in said):
        raise MisuseError(f"{place} needs either a prompt or messages. {_FORM}.")
    if "prompt" in said:
        if not isinstance(said["prompt"], str) or not said["prompt"]:
            raise MisuseError(f"{place}: a prompt is text of at least one character.")
        return Asked(text=said["prompt"])
    return _of_messages(place, said["messages"])


def _of_messages(place: str, messages: Any) -> Asked:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not all(map(_is_message, messages)):
        raise MisuseError(f"{place}: messages are a list of objects with a role and a content, both text. {_FORM}.")
    turns = [(one["role"], one["content"]) for one in messages]
    system = turns.pop(0)[1] if turns and turns[0][0] in ("system", "developer") else None
    roles = ["model" if role == "assistant" else role for role, _ in turns]
    if len(roles) % 2 == 0 or roles != ["user", "model"] * (len(roles) // 2) + ["user"]:
        raise MisuseError(
            f"{place}: after a system message the roles alternate, user and assistant, and the last is the user's; got "
            f"{', '.join(roles) or 'none'}."
        )
    said = [content for _, content in turns]
    return Asked(text=said[-1], chat=True, system=system, earlier=tuple(zip(said[:-1:2], said[1::2], strict=True)))


def _is_message(one: Any) -> bool:
    return isinstance(one, Mapping) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
