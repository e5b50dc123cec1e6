"""`reproduce` makes each failure happen for real, on the real weights, and tells them apart."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.run.scenarios import SCENARIOS

Run = Callable[..., Any]
TORCHS_OWN = "probability tensor contains either `inf`, `nan` or element < 0"


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_is_reproduced_and_recognised(checkpoint_270m: Checkpoint, stabilitykit: Run, name: str) -> None:
    result = stabilitykit("reproduce", name, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert (found["scenario"], found["reproduced"]) == (name, True)
    assert found["error"] == TORCHS_OWN
    assert found["cause"] == SCENARIOS[name].expected
    assert found["chain"][0]["event"] == "break"


def test_no_two_scenarios_share_a_cause() -> None:
    assert len({scenario.expected for scenario in SCENARIOS.values()}) == len(SCENARIOS)


def test_the_default_shows_the_error_and_its_chain(checkpoint_270m: Checkpoint, stabilitykit: Run) -> None:
    result = stabilitykit("reproduce")
    assert result.code == 0
    assert f"RuntimeError: {TORCHS_OWN}" in result.out
    assert "Reproduced." in result.out
    assert "layer 7" in result.out


def test_raise_raises_torchs_own_error(checkpoint_270m: Checkpoint, stabilitykit: Run) -> None:
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        stabilitykit("reproduce", "--raise")


def test_rescale_breaks_random_weights_of_every_generation(stabilitykit: Run) -> None:
    for size in ("gemma-2b", "gemma2-2b", "gemma3-270m"):
        small = f"random:{size}?layers=2&hidden_size=32&feed_forward=64&heads=2&kv_heads=1&head_dim=16&vocabulary=512"
        healthy = stabilitykit("reproduce", "--checkpoint", small, "--json")
        assert (healthy.code, json.loads(healthy.out)["reproduced"]) == (1, False)
        broken = stabilitykit("reproduce", "--checkpoint", small, "--rescale", "65536", "--json")
        assert (broken.code, json.loads(broken.out)["reproduced"]) == (0, True)


def test_list_names_every_scenario(stabilitykit: Run) -> None:
    result = stabilitykit("reproduce", "--list")
    assert result.code == 0
    assert all(scenario.summary in result.out for scenario in SCENARIOS.values())
    assert [one["scenario"] for one in json.loads(stabilitykit("reproduce", "--list", "--json").out)] == list(SCENARIOS)


def test_an_unknown_scenario_is_told_the_known_ones(stabilitykit: Run) -> None:
    result = stabilitykit("reproduce", "out-of-memory")
    assert result.code == 2
    assert "float16-overflow" in result.err
    assert result.err.count("\n") == 1
