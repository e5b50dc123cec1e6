"""From the worst tokens to prompts: one token more at a time, the nearest few kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stabilitykit.searches.scan import Count, Peak, Scanner


@dataclass(frozen=True, slots=True)
class Grown:
    """A prompt; the peak of its newest token, and the largest of all, which no token that follows can change."""

    tokens: tuple[int, ...]
    newest: Peak
    largest: Peak


def extend(
    scanner: Scanner,
    starts: Sequence[Grown],
    candidates: Sequence[int],
    *,
    beam: int,
    length: int,
    is_prompt: Callable[[tuple[int, ...]], bool],
    progress: Callable[[int], Count] | None = None,
) -> Iterator[list[Grown]]:
    """For each number of tokens up to `length` the `beam` prompts whose newest token has the largest peak, best first.

    They grow from `starts`, of one length and all of them, by each of `candidates`. The newest token decides, for what
    came before is the same in every prompt with that beginning. `is_prompt` says which are worth keeping; it ends where
    none are. `progress` is asked for a counter of each length.
    """
    kept = sorted(starts, key=_newest, reverse=True)
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
        kept = _first(sorted(grown, key=_newest, reverse=True), is_prompt, beam)
        if kept:
            yield kept


def _newest(grown: Grown) -> float:
    return grown.newest.value


def _first(ranked: Sequence[Grown], is_prompt: Callable[[tuple[int, ...]], bool], amount: int) -> list[Grown]:
    found: list[Grown] = []
    for one in ranked:
        if len(found) == amount:
            break
        if is_prompt(one.tokens):
            found.append(one)
    return found
