"""What a recorder could not see of a forward pass, which goes on all the same."""

from collections.abc import Iterator
from contextlib import contextmanager

MOST = 5
"""Notes in a header; what is beyond them is counted."""


class StopAtBreak(Exception):  # noqa: N818  no error: the first break has been seen
    """Ends a recorded block early."""


class Unseen:
    """Notes on what could not be seen, each kind once.

    A recorder that fails must not end the pass that it looks at: it notes what it failed at instead.
    """

    def __init__(self) -> None:
        self._notes: dict[str, tuple[str, int]] = {}  # by kind: what, and how often

    def note(self, what: str, kind: str | None = None) -> None:
        """`what` of the model could not be seen; of one `kind`, `what` itself unless given, the first is kept."""
        first, count = self._notes.get(kind or what, (what, 0))
        self._notes[kind or what] = first, count + 1

    def failed(self, what: str, error: Exception, kind: str | None = None) -> None:
        """As `note`, because looking at it raised `error`. StopAtBreak is raised again, for it is meant."""
        if isinstance(error, StopAtBreak):
            raise error
        lines = str(error).splitlines() or [""]
        self.note(f"{what} ({type(error).__name__}: {lines[0][:200]})", f"{kind or what} {type(error).__name__}")

    @contextmanager
    def guard(self, what: str, kind: str | None = None) -> Iterator[None]:
        """What raises in the block becomes a note."""
        try:
            yield
        except Exception as error:
            self.failed(what, error, kind)

    def notes(self) -> list[str]:
        """A sentence on each, and one on how many more there are."""
        said = [
            f"could not be seen: {what}" + (f", and {count - 1} more like it" if count > 1 else "")
            for what, count in list(self._notes.values())[:MOST]
        ]
        more = len(self._notes) - len(said)
        return [*said, f"could not be seen: {more} more things of other kinds"] if more else said
