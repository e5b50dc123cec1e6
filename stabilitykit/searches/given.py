"""Prompts that are given, brought to overflow: shortened where they do, put together or changed where they do not."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from stabilitykit.models.matmul import preferred_matmul
from stabilitykit.models.transformers.model import run_on
from stabilitykit.recorder import record
from stabilitykit.records import Record
from stabilitykit.records.search import Find
from stabilitykit.searches.confirm import confirm, dtype_of
from stabilitykit.searches.searched import Searched
from stabilitykit.searches.text import text_of

TRIED = 64  # dangerous tokens that are put in a prompt
CHANGES = 3  # tokens of a prompt that are replaced, at most
JOINED = 6  # prompts of which pairs are put together, at most

_BATCH = 2048  # tokens

Tokens = tuple[int, ...]


class GivenPrompts:
    """Tries prompts on `models`. `worst` are tokens to put in them, the most dangerous first."""

    def __init__(self, models: Searched, worst: Sequence[int], tried: Callable[[int, int], None]) -> None:
        self._models = models
        self._worst = tuple(worst[:TRIED])
        self._tried = tried

    def finds(self, prompts: Sequence[Sequence[int]]) -> list[Find]:
        """For each prompt one: the shortest part of it that overflows; or else, with a few of its tokens replaced by
        worse ones, what does or comes nearest. Where no prompt overflows as it is, pairs of them are put together in
        both orders, and what overflows then is added. Each was run in the dtype.
        """
        found, broke = [], False
        rows = [tuple(one) for one in prompts]
        for number, tokens in enumerate(rows, start=1):
            self._tried(number - 1, len(rows))
            broken = self._first_break(tokens) is not None
            broke |= broken
            found.append(self._confirmed(self._shortened(tokens) if broken else self._changed(tokens)))
            self._tried(number, len(rows))
        if not broke:
            found += [self._confirmed(self._shortened(pair)) for pair in itertools.islice(self._pairs(rows), 1)]
        return found

    def _first_break(self, tokens: Tokens) -> Record | None:
        low = self._models.low
        kind = preferred_matmul(dtype_of(low), low.device.type)
        with torch.inference_mode(), record(low.module, formats=(), stop_at_break=True, matmul=kind) as recording:
            run_on(low.module, low.arguments(torch.tensor([tokens], device=low.device)))
        return recording.first_break()

    def _shortened(self, tokens: Tokens) -> Tokens:
        """Without what stands after the break, then from the left by halves down to single tokens, while it breaks."""
        start = len(self._models.begin) if tokens[: len(self._models.begin)] == self._models.begin else 0
        first = self._first_break(tokens)
        position = None if first is None or first.broke is None else first.broke.position
        if position is not None and self._first_break(tokens[: position + 1]) is not None:
            tokens = tokens[: position + 1]
        step = max((len(tokens) - start) // 2, 1)
        while step:
            shorter = (*tokens[:start], *tokens[start + step :])
            if len(tokens) - start > step and self._first_break(shorter) is not None:
                tokens = shorter
            else:
                step //= 2
        return tokens

    def _changed(self, tokens: Tokens) -> Tokens:
        """Where its value is largest a prompt gets the token that makes it larger still, a few times over."""
        for _ in range(CHANGES):
            peaks = self._models.recorder.peaks(tokens)
            at = max(range(len(self._models.begin), len(tokens)), key=lambda n: peaks[n].value, default=None)
            if at is None or not self._worst:
                return tokens
            rows = [(*tokens[:at], token, *tokens[at + 1 :]) for token in self._worst]
            best = max(self._values(rows), key=lambda pair: pair[0])
            if best[0] <= max(peak.value for peak in peaks):
                return tokens
            tokens = best[1]
            if self._first_break(tokens) is not None:
                return self._shortened(tokens)
        return tokens

    def _values(self, rows: Sequence[Tokens]) -> Iterator[tuple[float, Tokens]]:
        size = max(1, _BATCH // len(rows[0]))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            for row, peaks in zip(some, self._models.recorder.peaks_of(some), strict=True):
                yield max(peak.value for peak in peaks), row

    def _pairs(self, rows: Sequence[Tokens]) -> Iterator[Tokens]:
        begin = len(self._models.begin)
        for one, other in itertools.permutations(rows[:JOINED], 2):
            joined = (*one, *(other[begin:] if other[:begin] == self._models.begin else other))
            if len(joined) <= self._models.context and self._first_break(joined) is not None:
                yield joined

    def _confirmed(self, tokens: Tokens) -> Find:
        begin = self._models.begin
        bos = bool(begin) and tokens[: len(begin)] == begin
        text = text_of(self._models.tokenizer, tokens[len(begin) if bos else 0 :])
        return confirm(self._models.recorder, self._models.low, tokens, bos=bos, text=text)
