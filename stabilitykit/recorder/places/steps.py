"""Steps: what enters the model with each call, what of it a cache holds, and which ids stood there before."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from stabilitykit.recorder.places.labels import NONE
from stabilitykit.recorder.places.merge import agreeing
from stabilitykit.recorder.places.streams import (
    Entering,
    Ids,
    Step,
    Stream,
    cache_of,
    cached,
    cached_keys,
    entering,
    entering_part,
    held,
    named,
)
from stabilitykit.recorder.places.track import Tracker
from stabilitykit.recorder.tensors import aside

_MADE = ("past_key_values", "cache_params")


class _Cache:
    """A cache, the stream that it holds, and the memory of its keys when the last step ended."""

    __slots__ = ("keys", "of", "stream")

    def __init__(self, cache: Any, stream: Stream) -> None:
        self.of = weakref.ref(cache)
        self.stream = stream
        self.keys: int | None = None


class Steps:
    """The steps of one recorded block; `seen` are the ids of all tokens in it."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.seen: set[int] = set()
        self.whole: Sequence[Ids] | None = None  # of the last step whose history is known
        self._caches: dict[int, _Cache] = {}
        self._last: Stream | None = None  # of a call whose cache was not seen
        self._latest: Stream | None = None

    def begin(self, module: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
        """Before a call of the model. What fails in here only makes places unknown."""
        number = self.tracker.step.number + 1
        try:
            return self._begin(module, args, kwargs)
        except Exception as failed:
            self.tracker.note(failed)
            step = Step(number)
            self.tracker.begin(step)
            return step

    def _begin(self, module: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
        given = dict(named(module, args, kwargs))
        start, cache = held(given), cache_of(given)
        step = Step(self.tracker.step.number + 1, start)
        found = entering(module, args, kwargs)
        state = self._caches.get(id(cache))
        if not start and state is not None and state.of() is cache and cached_keys(cache) is None:
            start = step.start = state.stream.end  # a state that does not grow cannot say how long it is
        before = self._before(cache, start)
        rows_from = None if before is None else self._rows_from(cache, before)
        self.tracker.begin(step)
        decodes = any(one.name.startswith("decoder") for one in found)
        main = [one for one in found if one.ids or one.name.endswith("embeds")] or found[:1]
        first: Stream | None = None
        for one in found:
            if one not in main and self.tracker.of(one.tensor).position is not None:
                continue  # made from something that entered before
            own = one in main and (not decodes or one.name.startswith("decoder"))
            stream = self._stream(one, start if own else 0)
            stream.adrift = own and not start and self._may_go_on(stream, cache)
            if own and before is not None and first is None:
                self._continue(stream, before, rows_from)
            self.tracker.enter(one, stream)
            first = stream if own and first is None else first
        if first is not None and first.row_from is not None:
            for tensor in cached(cache):
                self.tracker.renumber(tensor, first.rows)
        self._hold(cache, first)
        self._latest = first or self._latest
        return step

    def _may_go_on(self, stream: Stream, cache: Any) -> bool:
        """Whether a single position without a cache may follow those of the call before."""
        before = self._latest
        return cache is None and stream.length == 1 and before is not None and (before.length > 1 or before.adrift)

    def part(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call of a part of the model, which may be given ids or embeddings that were not followed so far."""
        try:
            self._part(args, kwargs)
        except Exception as failed:
            self.tracker.note(failed)

    def _part(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for one in entering_part(args, kwargs):
            known = self.tracker.of(one.tensor)
            if known.position is not None and known.position.complete:
                continue
            start = held(kwargs)
            stream = self._stream(one, start)
            tokens = None
            if known.position is not None and not one.ids:  # embeddings, and vectors that are none of a token's
                of = self.tracker.step.streams[known.slot]
                tokens = _placed(of, known, stream)
            if tokens is not None:
                stream.tokens, stream.counts = tokens, "token"
            before = self._before(cache_of(kwargs), start)
            if before is not None:
                self._continue(stream, before, None)
            self.tracker.enter(one, stream)
            self._hold(cache_of(kwargs), stream)

    def ended(self, module: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """After a call: which memory its cache has now."""
        try:
            self._ended(cache_of(dict(named(module, args, kwargs))), output)
        except Exception as failed:
            self.tracker.note(failed)

    def _ended(self, cache: Any, output: Any) -> None:
        made = next((held for name in _MADE if (held := getattr(output, name, None)) is not None), None)
        if cache is None and made is not None and self._last is not None:
            self._hold(made, self._last)
            cache = made
        known = self._caches.get(id(cache))
        keys = None if known is None else cached_keys(cache)
        if known is not None and keys is not None:
            known.keys = self.tracker.keep(keys)

    def _stream(self, one: Entering, start: int) -> Stream:
        shape = one.tensor.shape
        rows = 1 if one.row is None else shape[one.row]
        length = 0 if one.position is None else shape[one.position]
        stream = Stream(one.name, start, rows, length, one.counts)
        if one.ids and not one.tensor.is_meta:
            with aside():
                stream.tokens = one.tensor.reshape(rows, length).tolist()
            self.seen.update(*stream.tokens)
            if not start:
                self.whole = stream.tokens
        return stream

    def _before(self, cache: Any, start: int) -> Stream | None:
        """The stream that a call with this cache continues."""
        if not start:
            return None
        known = self._caches.get(id(cache))
        if known is not None and known.of() is cache:
            return known.stream
        return self._last

    def _rows_from(self, cache: Any, before: Stream) -> Sequence[int] | None:
        """Which row of the stream before each row of the cache holds; () where that is not known."""
        keys = cached_keys(cache)
        known = self._caches.get(id(cache))
        same = tuple(range(before.rows))
        if keys is None:
            return same
        if known is not None and known.keys is not None and known.keys == keys.untyped_storage()._cdata:
            return same
        labels = self.tracker.of(keys)
        if labels.row is None:
            return same if before.rows == 1 and keys.shape[0] == 1 else ()
        agreed, differ = agreeing(labels.row.values, tuple(range(1, keys.ndim)))
        rows: list[int] = agreed.reshape(-1).tolist()
        if differ or NONE in rows:
            return ()
        return tuple(rows * keys.shape[0] if len(rows) == 1 else rows)

    def _continue(self, stream: Stream, before: Stream, rows_from: Sequence[int] | None) -> None:
        """`stream` goes on from where a cache ends that holds `before`, or a part of it that begins at the first."""
        stream.sequence, stream.after = before.sequence, before
        if rows_from is None:
            rows_from = tuple(range(before.rows))
        if len(rows_from) != stream.rows:
            return
        if list(rows_from) != list(range(before.rows)):
            stream.row_from = rows_from
        known = before.known
        if known is not None and all(row < len(known) for row in rows_from):
            old = [known[row][: stream.start] for row in rows_from]
            if all(len(row) == stream.start for row in old):
                stream.before = old
        whole = stream.known
        if whole is not None:
            self.whole = whole

    def _hold(self, cache: Any, stream: Stream | None) -> None:
        if stream is None:
            return
        if cache is None or isinstance(cache, list | tuple):
            self._last = stream
            return
        try:
            self._caches[id(cache)] = _Cache(cache, stream)
        except TypeError:  # no weak reference to it
            self._last = stream


def _placed(of: Stream, known: Any, stream: Stream) -> Sequence[Ids] | None:
    """The ids of a sequence of embeddings, some of which are those of tokens."""
    if of.tokens is None or known.position.dims != (1,) or of.rows != stream.rows:
        return None
    places = known.position.values.reshape(-1).tolist()
    return [[None if place == NONE or place < 0 else row[place] for place in places] for row in of.tokens]


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a module is called with, as they are in its arguments."""
    return [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
