"""The command lines that advice names: quoted for a shell, with the options that the user's own command had.

A finding that advises to do something says which command does it. Inside `typed` that is done for somebody who uses the
command line: what the user said there of the model and its input is said again. Elsewhere nothing is known of a user,
and advice to callers of a function stays Python.
"""

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

_INPUT = ("--prompt", "--batch", "--system", "--chat", "--no-bos", "--special-tokens", "--left-padding", "--generate")
_MODEL = (
    "--rounding",
    "--stress",
    "--attention",
    "--adapter",
    "--trust-remote-code",
    "--device",
    "--matmul",
)
_NOT_THE_SAME = {"repair": ("--no-bos",)}  # of other texts, which have to fit as well
_NEEDS_TEXT = ("diagnose", "forecast", "profile")
_UNKNOWN = "..."
_USUAL = "float16"


@dataclass(frozen=True, kw_only=True)
class Typed:
    """A command as the user typed it: the `checkpoint` or the `file` that it names, and the values of each option.

    An option without values is a flag. `known` are the options of every command.
    """

    checkpoint: str | None = None
    file: str | None = None
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    known: Mapping[str, Collection[str]] = field(default_factory=dict)


_typed: ContextVar[Typed | None] = ContextVar("typed", default=None)


@contextmanager
def typed(command: Typed | None) -> Iterator[None]:
    """Inside the block advice is for the user who typed this; with None for nobody in particular, as on a page."""
    token = _typed.set(command)
    try:
        yield
    finally:
        _typed.reset(token)


def is_typed() -> bool:
    """Whether advice is for somebody who named a model on the command line, or a file that makes one."""
    mine = _typed.get()
    return mine is not None and (mine.checkpoint or mine.file) is not None


def given(option: str) -> tuple[str, ...]:
    """The values that the user typed for an option; none where it was not given."""
    mine = _typed.get()
    return () if mine is None else tuple(mine.options.get(option, ()))


def line(command: str, *words: object) -> str:
    """`stabilitykit COMMAND WORDS`, quoted for a shell."""
    return shlex.join(["stabilitykit", command, *map(str, words)])


def again(command: str, checkpoint: str, *words: object, dtype: str | None = None) -> str:
    """`line` for the same model and input: what the user typed of them, where `command` takes it and `words` do not say
    otherwise. `dtype` is named where it is not the one that commands run in anyway. `--prompt ...` stands for a text
    that is not known, or that shall not be told.
    """
    mine = (is_typed() and _typed.get()) or Typed()
    said = [mine.file or mine.checkpoint or checkpoint, *map(str, words)]
    said += [] if dtype in (None, _USUAL) else ["--dtype", str(dtype)]
    for option in (*_INPUT, *_MODEL):
        values = mine.options.get(option)
        takes = option in mine.known.get(command, ()) and option not in _NOT_THE_SAME.get(command, ())
        secret = option == "--prompt" and "--redact" in mine.options
        if values is not None and takes and not secret and option not in said:
            said += [word for value in values for word in (option, value)] or [option]
    needs_text = command in _NEEDS_TEXT and mine.file is None and not {"--prompt", "--batch"} & set(said)
    return f"{line(command, *said)}{f' --prompt {_UNKNOWN}' if needs_text else ''}"


def repair(checkpoint: str) -> str | None:
    """The line that writes a model scaled for float16; None where what ran is not what lies on disk."""
    mine = (is_typed() and _typed.get()) or Typed()
    if "--stress" in mine.options:
        return None
    name = mine.checkpoint or checkpoint
    return again("repair", name, "--out", folder_for(name))


def training() -> str:
    """What tries changes on a training step: a command line, or for those who call functions a function."""
    mine = _typed.get()
    if mine is None:
        return "sk.diagnose_training(make)"
    return line("diagnose", mine.file or "FILE.py:make", "--backward")


def folder_for(checkpoint: str) -> str:
    """A name for a checkpoint's repaired folder, beside where the command runs: `my-model-float16`."""
    name = checkpoint.removeprefix("hf:").rstrip("/").rpartition("/")[2].partition("?")[0]
    return f"{name.replace(':', '-')}-float16"
