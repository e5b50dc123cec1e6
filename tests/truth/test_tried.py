"""A diagnosis tries what cures a fault and shows that it does, advises nothing that failed, and touches nothing."""

import pytest

from truth.cures import by_hand
from truth.row import Row
from truth.table import CONTROLS, TABLE
from truth.tried import tried


def _by_key(rows: tuple[Row, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row.key for row in rows])


MISSED = {
    "7-qwen3-detour_after_the_embedding": "the residual stream is float32 from the first layer on, not before it",
}
"""Rows of which a cure is known to be missing, and why."""


@pytest.mark.table
@_by_key(TABLE)
def test_what_cures_by_hand_is_tried_and_shown_to_cure_and_nothing_that_failed_is_advised(row: Row) -> None:
    one = tried(row)
    if row.key in MISSED and one.faults:
        assert all(fault.startswith("not tried") for fault in one.faults)
        pytest.xfail(MISSED[row.key])
    assert not one.faults, one


@pytest.mark.table
@_by_key(CONTROLS)
def test_where_nothing_is_wrong_there_is_nothing_to_cure(row: Row) -> None:
    one = tried(row)
    assert not one.faults, one


def test_a_change_by_hand_cures_what_it_should_and_nothing_else() -> None:
    rows = {row.key: row for row in TABLE}
    names = ("up and down factors", "query and key factors", "float32 residual", "float32", "weight replaced")
    expected = {
        "5-llama-gate_·_up_overflows": {"up and down factors", "float32"},
        "5-llama-q_·_k_before_the_scale": {"query and key factors", "float32"},
        "5-llama-residual_sum": {"float32 residual", "float32"},
        "10-llama-NaN_in_a_weight": {"weight replaced"},
    }
    assert {key: set(by_hand(rows[key], names).cures) for key in expected} == expected
