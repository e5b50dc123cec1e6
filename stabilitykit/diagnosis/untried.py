"""What records cannot know, which is whether a candidate helps; and how to find out."""

import shlex

from stabilitykit.records import Header

UNTRIED = "A candidate, not tried: "


def how_to_try(header: Header, command: str | None = None) -> str:
    """The line to type that tries candidates on the input that failed; `command` is it, where it is known in full."""
    if command is None:
        known = header.checkpoint if header.sha256 is not None else None  # the kit read it, and nobody changed it since
        command = (
            "sk.diagnose(model, ...)" if known is None else f"stabilitykit diagnose {shlex.quote(known)} --prompt ..."
        )
    return f"To try it on this input, and whatever else may help: `{command}`."
