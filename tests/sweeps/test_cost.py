"""What a case will cost: more for more work, in the bytes that its footprint has."""

from typing import Any

from stabilitykit.checkpoints.config import released
from stabilitykit.models.gemma.footprint import footprint
from stabilitykit.records.sweep import USUAL, Case, CaseKind
from stabilitykit.sweeps.cost import cost

CONFIG = released("gemma3-270m")


def case(tokens: int = 64, **settings: Any) -> Case:
    kind: CaseKind = "lengths" if "checks" in settings else "run"
    length = f"1..{tokens}" if kind == "lengths" else tokens
    given = {**USUAL, "dtype": "float32", "device": "cpu", "length": length, "tokens": tokens}
    return Case(kind=kind, settings=given | settings)


def seconds(asked: Case) -> float:
    found = cost(asked, CONFIG)
    assert found is not None
    return found.seconds


def test_memory_is_that_of_weights_and_activations() -> None:
    needs = footprint(CONFIG, "float32", 64)
    found = cost(case(), CONFIG)
    assert found is not None
    assert found.memory == needs.weights + needs.activations


def test_attention_makes_long_prompts_cost_more_than_their_share() -> None:
    assert seconds(case(4096)) > 4 * seconds(case(1024)) > 16 * seconds(case(256)) > 0


def test_a_range_costs_its_longest_pass_and_its_checks() -> None:
    alone, checked = seconds(case(1024, checks=[])), seconds(case(1024, checks=[512, 1024]))
    assert alone < checked < 2 * alone


def test_what_runs_no_prompt_has_no_price() -> None:
    assert cost(Case(kind="memory", settings={"dtype": "float32", "length": 64, "device": "cpu"}), CONFIG) is None
