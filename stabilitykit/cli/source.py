"""What was examined, as the commands print it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stabilitykit.words import count, quoted

if TYPE_CHECKING:
    from stabilitykit.records import Recording

_SHOWN = 16  # tokens


def print_source(recording: "Recording", pieces: Sequence[str], redact: bool) -> None:
    """The checkpoint, notes on it, and the prompt's tokens."""
    from stabilitykit.cli import screen

    print_checkpoint(str(recording.header.checkpoint), recording.header.notes, end=False)
    amount = count(len(pieces), "token")
    given = recording.header.case.get("given")
    if given:
        screen.print_note(", ".join(f"{name} {' × '.join(map(str, shape))}" for name, shape in given.items()))
    elif redact:
        screen.print_note(f"{amount}, redacted.")
    else:
        shown = " ".join(map(quoted, pieces[:_SHOWN]))
        screen.print_note(f"{amount}: {shown}{' ...' if len(pieces) > _SHOWN else ''}")
    screen.output.print()


def print_checkpoint(source: str, notes: Sequence[str], *, end: bool = True) -> None:
    """The checkpoint and notes on it, and with `end` an empty line."""
    from stabilitykit.cli import screen

    for note in (source, *(f"{note}." for note in notes)):
        screen.print_note(note)
    if end:
        screen.output.print()
