"""A judgement tells a right answer from one that leaves something out, one that misleads and one that is wrong."""

from typing import Any

import pytest

from truth.plain import full, lines
from truth.row import Expected, Origin, Planted, Row
from truth.score import false_sums, judge, operators_score

RIGHT = Expected(
    sites=("layers.*.mlp/mul.0",), operators=("mul",), kinds=("overflow",), origin=Origin(kinds=("computed",)),
    position=3, positions=(3,), value=90000.0, outcome="absorbed", harmless=False, says=("90,000",), never=("safe",),
)  # fmt: skip
SAID: dict[str, Any] = {
    "site": "layers.1.mlp/mul.0", "operator": "mul", "kind": "overflow", "origin": {"kind": "computed"}, "label": None,
    "row": 0, "position": 3, "positions": [], "rows": [], "step": 0, "channel": 0, "token_id": None, "value": 90010.0,
    "outcome": "absorbed", "harmless": None,
}  # fmt: skip


def said(verdict: str = "300 · 300 = 90,000", **changes: Any) -> dict[str, Any]:
    return {"dtype": "float16", "verdict": verdict, "first_break": SAID | changes}


@pytest.mark.parametrize(
    ("document", "score"),
    [
        (said(), "exact"),
        (said(positions=[3], harmless=False), "exact"),
        (said(position=None), "acceptable"),
        (said(origin=None), "acceptable"),
        (said("it overflows"), "acceptable"),
        (said(position=2), "misleading"),
        (said(positions=[3, 4]), "misleading"),
        (said(kind="input"), "misleading"),
        (said(value=80000.0), "misleading"),
        (said(harmless=True), "misleading"),
        (said(outcome="reached"), "misleading"),
        (said("90,000, which is safe"), "misleading"),
        (said("90,000. Check what is passed to the model."), "misleading"),
        (said("300 · 300 = 80,000 and 90,000"), "misleading"),
        (said(site="layers.1.mlp.down_proj"), "wrong"),
        ({"dtype": "float16", "verdict": "", "first_break": None}, "wrong"),
    ],
)
def test_an_answer_is_judged_by_every_column(document: dict[str, Any], score: str) -> None:
    assert operators_score(RIGHT, document)[0] == score


def test_an_alarm_without_a_fault_is_wrong_and_a_fault_that_is_none_is_refused() -> None:
    def overflow() -> Planted:
        return lines(lambda m, x: x * x - 1, full(300.0), expected=None)

    with pytest.raises(AssertionError, match="not finite"):
        judge(Row(name="none", root=1, family="plain", make=overflow), "operators")


@pytest.mark.parametrize(
    ("text", "false"),
    [
        ("60,000 + 8,000 = 68,000 exceeds", False),
        ("3e+20 · 2 = 6e+20", False),
        ("60,000 - -60,000 = 120,000", False),
        ("-60,000 - 60,000 = 120,000", True),
        ("30,000 + 30,000 = 120,000", True),
        ("30,000 + 3 · 30,000 = 120,000", False),
    ],
)
def test_sums_are_checked(text: str, false: bool) -> None:
    assert bool(false_sums(text)) == false
