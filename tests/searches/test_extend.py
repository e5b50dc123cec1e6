"""Prompts that grow: the beam against going on with the best alone, and against trying everything."""

from collections.abc import Sequence

import pytest
from planted import FIRST, SECOND, dangerous_pair
from remedied import small

from stabilitykit.models.gemma import build
from stabilitykit.searches.extend import Grown, extend
from stabilitykit.searches.scan import Scanner

CANDIDATES = list(range(270, 294))


def starts(scanner: Scanner) -> list[Grown]:
    return [Grown((c,), p, p) for c, p in zip(CANDIDATES, scanner.scan(CANDIDATES), strict=True)]


def grown(scanner: Scanner, beam: int, length: int = 3, keep: str = "") -> list[list[Grown]]:
    def is_prompt(tokens: Sequence[int]) -> bool:
        return keep != "falling" or list(tokens) == sorted(tokens, reverse=True)

    begin = sorted(starts(scanner), key=lambda one: -one.newest.value)[:beam]
    return list(extend(scanner, begin, CANDIDATES, beam=beam, length=length, is_prompt=is_prompt))


@pytest.mark.slow
def test_a_beam_comes_at_least_as_near_as_the_best_alone() -> None:
    scanner = Scanner(build(small(3)))
    beam, greedy = grown(scanner, 6), grown(scanner, 1)
    assert [len(level) for level in beam] == [6] * 3
    assert [len(level[0].tokens) for level in beam] == [1, 2, 3]
    assert [len(level) for level in greedy] == [1] * 3
    for wide, narrow in zip(beam, greedy, strict=True):
        assert wide[0].newest.value >= narrow[0].newest.value * (1 - 1e-6)
    assert beam[-1][0].newest.value > greedy[-1][0].newest.value


def test_a_beam_of_everything_finds_the_best_of_all_pairs() -> None:
    scanner = Scanner(build(small(2)))
    level = grown(scanner, len(CANDIDATES), 2)[1]
    pairs = {
        (first, second): peak.value
        for first in CANDIDATES
        for second, peak in zip(CANDIDATES, scanner.scan(CANDIDATES, [first]), strict=True)
    }
    best = sorted(pairs, key=lambda pair: -pairs[pair])[: len(CANDIDATES)]
    assert [one.newest.value for one in level] == pytest.approx([pairs[pair] for pair in best], rel=1e-6)
    assert level[0].tokens == best[0]


def test_the_largest_is_of_every_position() -> None:
    scanner = Scanner(build(dangerous_pair()))
    peaks = scanner.scan([SECOND, FIRST])
    first = Grown((SECOND,), peaks[0], peaks[0])
    (_, (after,)) = extend(scanner, [first], [280], beam=1, length=2, is_prompt=lambda tokens: True)
    assert after.newest.value < 30_000
    assert after.largest.value == first.newest.value == pytest.approx(50_000, rel=1e-3)


def test_only_prompts_are_kept() -> None:
    scanner = Scanner(build(small(1)))
    levels = grown(scanner, 5, 3, keep="falling")
    for level in levels:
        assert level
        assert all(list(one.tokens) == sorted(one.tokens, reverse=True) for one in level)
    assert not list(extend(scanner, [], CANDIDATES, beam=5, length=3, is_prompt=lambda tokens: True))
    (only,) = extend(scanner, starts(scanner), CANDIDATES, beam=5, length=3, is_prompt=lambda tokens: False)
    assert len(only) == len(CANDIDATES)
