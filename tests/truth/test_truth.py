"""Planted faults are diagnosed as what they are, and where nothing is wrong nothing is said."""

from collections import Counter

import pytest

from truth.generated import generate
from truth.row import ROOTS, Row
from truth.score import judge
from truth.table import CONTROLS, TABLE


def _by_key(rows: tuple[Row, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row.key for row in rows])


@pytest.mark.table
@_by_key((*TABLE, *CONTROLS))
def test_operators_tell_a_fault_exactly(row: Row) -> None:
    judgement = judge(row, "operators")
    if row.shortcoming:
        assert judgement.score in ("exact", "acceptable"), judgement
    else:
        assert judgement.score == "exact", judgement


@pytest.mark.table
@pytest.mark.parametrize("level", ["modules", "layers"])
@_by_key((*TABLE, *CONTROLS))
def test_modules_and_layers_tell_nothing_false(row: Row, level: str) -> None:
    judgement = judge(row, level)
    assert judgement.score not in ("wrong", "raised"), judgement


def test_every_topic_and_family_has_faults_and_there_are_controls() -> None:
    assert len(TABLE) >= 300
    assert len(CONTROLS) >= 60
    for counted in (Counter(row.root for row in TABLE), Counter(row.family for row in TABLE)):
        assert min(counted.values()) >= 8, counted
    assert {row.root for row in TABLE} == set(ROOTS)


def test_a_seed_always_draws_the_same_faults() -> None:
    assert [row.key for row in generate(7)] == [row.key for row in generate(7)]
    assert [row.key for row in generate(7)] != [row.key for row in generate(8)]


@pytest.mark.table
@pytest.mark.parametrize("number", range(0, 200, 3))
def test_faults_drawn_from_a_seed_are_told_exactly(number: int) -> None:
    row = next(row for place, row in enumerate(generate(0)) if place == number)
    judgement = judge(row, "operators")
    assert judgement.score == "exact", judgement
