"""The prompts of a sweep: those of every experiment, and a user's chats and batches in files."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from stabilitykit.errors import MisuseError
from stabilitykit.run.batch import Asked
from stabilitykit.run.inputs import CHATS, TENSORS, Text, read_prompt
from stabilitykit.run.prompts import Prompt, Reads, parse_prompt
from stabilitykit.run.prompts import tokens as text_tokens


class Reader(Protocol):
    """What a prompt asks of the model that reads it."""

    @property
    def tokenizer(self) -> Reads: ...

    def chat(self, asked: Asked) -> list[int]:
        """The tokens of a chat, in the model's own template."""
        ...


@dataclass(frozen=True, slots=True)
class SweptPrompt:
    """A text, or a chat, by the name that the experiment gives it."""

    name: str
    asked: Prompt | Asked

    @classmethod
    def read(cls, name: str, folder: Path) -> "SweptPrompt":
        """`@FILE.json` is a chat, and `@FILE.jsonl:3` the third line of several.

        Raises MisuseError as `parse_prompt` does, for files of tensors, which no length cuts, and for a file of several
        without a number.
        """
        return cls(name, _asked(name, folder))

    @property
    def repeats(self) -> bool:
        """Whether it is one token that stands for as many as are asked for."""
        return isinstance(self.asked, Prompt) and self.asked.repeats

    @property
    def sha256(self) -> str:
        """Of the text, or of all that is said in the chat."""
        if isinstance(self.asked, Prompt):
            return self.asked.sha256
        return hashlib.sha256(json.dumps(asdict(self.asked), sort_keys=True).encode()).hexdigest()

    def tokens(self, model: Reader, *, bos: bool, length: int | None) -> list[int]:
        """The first `length` tokens; a chat's are those of its template. Raises MisuseError as `run.prompts.tokens`."""
        if isinstance(self.asked, Prompt):
            return text_tokens(self.asked, model.tokenizer, bos=bos, length=length)
        ids = model.chat(self.asked)
        if length is not None and length > len(ids):
            raise MisuseError(
                f"A text is cut to a length, never drawn out: {self.name!r:.60} has {len(ids):,} tokens in the model's "
                f"template, and {length:,} were asked for. Ask for no more, or leave the length out."
            )
        return ids[:length]


def _asked(name: str, folder: Path) -> Prompt | Asked:
    path, _, number = name.removeprefix("@").partition(".jsonl:")
    file = Path(f"{path}.jsonl" if number else path)
    if not name.startswith("@") or file.suffix not in (*CHATS, *TENSORS):
        return parse_prompt(name, folder)
    if file.suffix in TENSORS:
        raise MisuseError(
            f"A sweep cuts texts to lengths, and {file} holds tensors; run it with `stabilitykit profile --prompt "
            f"@{file}` or `stabilitykit check --prompts {file}`."
        )
    found = [one.asked for one in read_prompt(f"@{folder / file}") if isinstance(one, Text)]
    if not number and len(found) > 1:
        raise MisuseError(f"{file} holds {len(found)} prompts; name each by its line among them, such as @{file}:1.")
    if number and not (number.isdecimal() and 1 <= int(number) <= len(found)):
        raise MisuseError(f"{file} holds the prompts 1 to {len(found)}; {number!r:.20} is none of them.")
    asked = found[int(number or 1) - 1]
    return asked if asked.chat else parse_prompt(f"text: {asked.text}", folder)
