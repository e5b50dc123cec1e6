"""What to do where a check does not hold because of the range, as command lines."""

from collections.abc import Iterator
from pathlib import PurePath

from stabilitykit.commands import again, given, repair
from stabilitykit.records.gate import Gate

_OF_THE_RANGE = ("range", "output", "headroom")
_TEXTS = (".txt", ".md")


def what_to_do(gate: Gate) -> Iterator[tuple[str, str]]:
    """What a command is for, and the command; nothing where no prompt left the range, or came near its end."""
    broken = [one for one in gate.violations if one.limit in _OF_THE_RANGE]
    if not gate.ran or not broken or gate.checkpoint is None:
        return
    names = [name for one in broken for name in one.prompts]
    texts = [path for path in given("--prompts") if PurePath(path).suffix in _TEXTS and PurePath(path).name in names]
    prompt = ("--prompt", f"@{texts[0]}") if texts else ()
    yield "To see where and why", again("profile", gate.checkpoint, *prompt, dtype=gate.dtype)
    yield "To try what may help", again("diagnose", gate.checkpoint, *prompt, dtype=gate.dtype)
    command = repair(gate.checkpoint)
    if gate.dtype == "float16" and command is not None:
        yield "To have the model scaled into the range, and written", command
