"""Where something is and what broke there, in words."""

from dataclasses import replace

import pytest
from swept import broke, broken_map, record

from stabilitykit.records import BreakKind
from stabilitykit.report.words import at_broken_token, happened, located, short_place
from stabilitykit.words import at_token, none_finished, place

_, SPAN = broken_map().spans


def test_a_place_is_its_layer_and_its_label_or_else_its_site() -> None:
    assert place(record(0, "layers.7", label="residual after MLP")) == "layer 7, residual after MLP"
    assert place(record(0, "layers.7/add.0")) == "layer 7, layers.7/add.0"
    assert place(record(0, "lm_head")) == "lm_head"
    assert located(SPAN) == "layer 1, residual after MLP (`layers.1`)"
    assert short_place(SPAN) == "layer 1, `'.'`"


def test_a_token_follows_a_place() -> None:
    assert at_token(1029, ".") == ", at token 1,029 '.'"
    assert at_token(0, None) == ", at token 0"
    assert at_token(None, ".") == ""
    assert at_broken_token(SPAN) == ", at token 28 `'.'`"


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("overflow", 68_384.0, "68,384 exceeds the float16 maximum, 65,504"),
        ("overflow", None, "the value exceeds the float16 maximum, 65,504"),
        (
            "reduction",
            12.0,
            "the result, 12, fits, but a partial sum on the way to it exceeds the float16 maximum, 65,504",
        ),
        ("division-by-zero", None, "the result is infinite although every operand is finite (add)"),
        ("masked-row", None, "every key of a row is masked, and its softmax is 0 / 0"),
        ("weight", None, "`layers.0/add.0` and `layers.0.mlp.down_proj` were not finite to begin with"),
    ],
)
def test_what_happened_has_its_numbers(kind: BreakKind, value: float | None, said: str) -> None:
    assert happened(replace(SPAN, broke=broke(kind, value=value)), "float16") == said


def test_nothing_finished_reads_well_for_one_and_for_many() -> None:
    assert none_finished(1, "case") == "the only case has not finished"
    assert none_finished(12, "case", " that would run") == "none of 12 cases that would run has finished"
