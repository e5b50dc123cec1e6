"""What a guard knows of the sequences in a batch, by their cache: how many steps they ran, and which rows broke."""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from stabilitykit.guards.wide import WideRows


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequences:
    """The rows of one batch. `known` broke and were reported, `ended` are those of them that were stopped.

    `wide` are in a wider dtype, `absorbed` and `low` are rows and sites that were reported for that.
    """

    rows: int
    steps: int = 0
    known: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    absorbed: set[int] = field(default_factory=set)
    low: set[str] = field(default_factory=set)
    wide: list[WideRows] = field(default_factory=list)

    @property
    def widened(self) -> set[int]:
        return {row for group in self.wide for row in group.rows}


class ByCache:
    """The sequences of each cache that is alive; a call without one has sequences of its own."""

    def __init__(self) -> None:
        self._held: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._of: dict[int, Sequences] = {}
        self._lock = threading.Lock()

    def of(self, cache: Any, rows: int) -> Sequences:
        """Those of `cache`, new ones where it is empty, unknown, or holds another number of rows."""
        with self._lock:
            found = self._of.get(id(cache)) if self._held.get(id(cache)) is cache else None
        if found is None or found.rows != rows or _is_empty(cache):
            return Sequences(rows)
        return found

    def keep(self, cache: Any, sequences: Sequences) -> None:
        """Until `cache` is gone."""
        try:
            with self._lock:
                self._held[id(cache)] = cache
                self._of[id(cache)] = sequences
                for gone in [address for address in self._of if address not in self._held]:
                    del self._of[gone]
        except TypeError:  # tuples take no weak reference
            self._of.pop(id(cache), None)

    def clear(self) -> None:
        with self._lock:
            self._of.clear()
            self._held.clear()


def _is_empty(cache: Any) -> bool:
    """Whether a cache holds no token, as far as that can be told without waiting for a device."""
    count = getattr(cache, "get_seq_length", None)
    layers = getattr(cache, "layers", None)
    if count is None or (
        isinstance(layers, list) and any(type(layer).__name__.startswith("Static") for layer in layers)
    ):
        return False
    try:
        return bool(count() == 0)
    except Exception:  # a cache of states has no length
        return False
