"""Planted faults are diagnosed as what they are, and where nothing is wrong nothing is said."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from truth.row import Row
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
