"""What records cannot know, which is whether a candidate helps; and how to find out."""

from stabilitykit.commands import again, is_typed
from stabilitykit.records import Header

UNTRIED = "A candidate, not tried: "


def named(header: Header) -> str | None:
    """What a command line calls the model; None where the kit did not read it, so that it may have been changed."""
    return header.checkpoint if header.sha256 is not None else None


def how_to_try(header: Header) -> str:
    """The line to type, or to write, that tries candidates on the input that failed."""
    known = named(header)
    command = "sk.diagnose(model, ...)" if known is None else again("diagnose", known, dtype=header.dtype)
    return f"To try it on this input, and whatever else may help: `{command}`."


def by_running(command: str, header: Header, dtype: str) -> str:
    """The line that runs the same in another dtype, in parentheses, for who uses the command line; empty for others."""
    known = named(header)
    return f" (`{again(command, known, '--dtype', dtype)}`)" if is_typed() and known is not None else ""
