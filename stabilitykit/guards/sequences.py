"""What a guard knows of the sequences in a batch, by their cache: how many steps they ran, and which rows broke."""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stabilitykit.guards.cache import Left, is_empty, length_of
from stabilitykit.guards.wide import WideRows


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequences:
    """The rows of one batch, which ran `steps` and were `fed` so many tokens each.

    `known` broke and were reported, `ended` are those of them that were stopped. `wide` are in a wider dtype,
    `absorbed` and `low` are rows and sites that were reported for that. `parted`: rows were in a wider dtype, and their
    own cache could not follow a change of the batch's.
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

    def cut(self, tokens: int) -> "Sequences":
        """The same rows, of whose cache so many tokens at the end were cut off."""
        for group in tuple(self.wide):
            try:
                group.cache.crop(-tokens)
            except Exception:  # a cache that cannot be
                self.wide.remove(group)
                self.parted = True
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
        another hand than a step's, so that its rows may be others. Under `generate` they are not, without beams, of
        which there are 0 outside of it.
        """
        with self._lock:
            kept = self._of.get(id(cache)) if self._held.get(id(cache)) is cache else None
        if kept is None or is_empty(cache) or (new > 1 and _was_emptied(cache)):
            return Sequences(rows)
        found, left = kept
        if not left.changed(cache) and found.rows == rows:
            return found
        cut = left.cut(cache)
        if beams == 1 and cut is not None and found.rows == rows:
            return found.cut(cut)
        return Sequences(rows) if new > 1 else found.moved(rows, beams)

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


def _was_emptied(cache: Any) -> bool:
    """Whether a cache that is written in place, in inference mode, has no token: that is waited for."""
    held = length_of(cache)
    return isinstance(held, Tensor) and held.is_inference() and int(held) == 0
