"""What a guard knows of the sequences in a batch, by their cache: how many steps they ran, and which rows broke."""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from stabilitykit.guards.cache import Left, is_empty, length_of
from stabilitykit.guards.wide import WideRows


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequences:
    """The rows of one batch. They ran `steps` and were `fed` so many tokens each. `known` broke and were reported, `ended` are those of them that were stopped.

    `wide` are in a wider dtype, `absorbed` and `low` are rows and sites that were reported for that. `parted`: rows
    were in a wider dtype, and their own cache could not follow a change of the batch's.
    """

    rows: int
    steps: int = 0
    fed: int = 0
    known: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    absorbed: set[int] = field(default_factory=set)
    low: set[str] = field(default_factory=set)
    wide: list[WideRows] = field(default_factory=list)

    parted: bool = False

    def without_wide(self) -> "Sequences":
        """The same rows, of a cache that no longer fits those of the wide ones."""
        self.parted |= bool(self.wide)
        self.wide = []
        return self

    def moved(self, rows: int, beams: int) -> "Sequences":
        """What is known when rows may have changed places: under beam search which group, else nothing."""
        made = Sequences(rows, self.steps, self.fed, low=self.low, parted=self.parted or bool(self.wide))
        if beams > 1 and rows == self.rows:
            for held, kept in ((self.known, made.known), (self.absorbed, made.absorbed)):
                groups = {row // beams for row in held}
                kept |= {row for row in range(rows) if row // beams in groups}
        return made

    @property
    def widened(self) -> set[int]:
        return {row for group in self.wide for row in group.rows}


class ByCache:
    """The sequences of each cache that is alive; a call without one has sequences of its own."""

    def __init__(self) -> None:
        self._held: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._of: dict[int, tuple[Sequences, Left]] = {}
        self._lock = threading.Lock()

    def of(self, cache: Any, rows: int, new: int, beams: int) -> Sequences:
        """Those of `cache` before a step of `new` tokens; new ones where it is empty, unknown, or was changed by
        another hand than a step's, so that its rows may be others.
        """
        with self._lock:
            kept = self._of.get(id(cache)) if self._held.get(id(cache)) is cache else None
        if kept is None or is_empty(cache):
            return Sequences(rows)
        found, left = kept
        change = left.change(cache)
        if found.rows == rows and change == "none" and (new == 1 or not _may_be_reset(cache)):
            return found
        if found.rows == rows and change == "cut":
            return found.without_wide()
        if new > 1:
            return Sequences(rows)
        return found.moved(rows, beams)

    def keep(self, cache: Any, sequences: Sequences) -> None:
        """Until `cache` is gone."""
        try:
            with self._lock:
                self._held[id(cache)] = cache
                self._of[id(cache)] = sequences, Left(cache)
                for gone in [address for address in self._of if address not in self._held]:
                    del self._of[gone]
        except TypeError:  # tuples take no weak reference
            self._of.pop(id(cache), None)

    def clear(self) -> None:
        with self._lock:
            self._of.clear()
            self._held.clear()


def _may_be_reset(cache: Any) -> bool:
    """Whether a cache was made in inference mode and is written in place, and it has no token: that is waited for."""
    held = length_of(cache)
    return isinstance(held, Tensor) and held.is_inference() and is_empty(cache) is None and int(held) == 0
