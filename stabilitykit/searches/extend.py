"""Beam search from the worst tokens to prompts: one more token at a time, keeping those with the least headroom."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from stabilitykit.searches.scan import Count, Peak
from stabilitykit.searches.searched import Scans


@dataclass(frozen=True, slots=True)
class Grown:
    """A prompt, the peak of its newest token, and the largest of all its peaks, which no later token can change."""

    tokens: tuple[int, ...]
    newest: Peak
    largest: Peak


def extend(
    scanner: Scans,
    starts: Sequence[Grown],
    candidates: Sequence[int],
    *,
    beam: int,
    length: int,
    is_prompt: Callable[[tuple[int, ...]], bool],
    progress: Callable[[int], Count] | None = None,
) -> Iterator[list[Grown]]:
    """For each number of tokens up to `length`, the `beam` prompts whose newest token has the largest peak, best first.

    They grow from `starts`, all of one length, by each of `candidates`. Only the newest token is compared, since
    everything before it is the same in every prompt with that beginning. `is_prompt` says which prompts to keep; the
    search ends where there are none. `progress` returns a counter for each length.
    """
    kept = sorted(starts, key=_newest_peak, reverse=True)
    if kept:
        yield kept
    while kept and len(kept[0].tokens) < length:
        count = None if progress is None else progress(len(kept[0].tokens) + 1)
        grown: list[Grown] = []
        for one in kept:
            peaks = scanner.scan(candidates, one.tokens)
            grown += [
                Grown((*one.tokens, token), peak, max(one.largest, peak, key=lambda p: p.value))
                for token, peak in zip(candidates, peaks, strict=True)
            ]
            if count is not None:
                count(len(grown), len(kept) * len(candidates))
        ranked = sorted(grown, key=_newest_peak, reverse=True)
        kept = list(islice((one for one in ranked if is_prompt(one.tokens)), beam))
        if kept:
            yield kept


def _newest_peak(grown: Grown) -> float:
    return grown.newest.value
