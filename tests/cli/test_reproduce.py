"""`reproduce` makes each failure happen for real, on the real weights, and tells them apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alone import run_alone, told

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


TINY = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512&context=64"


def test_export_writes_what_broke_the_270m_as_a_script_that_runs_alone(
    checkpoint_270m: Checkpoint, stabilitykit: Run, tmp_path: Path
) -> None:
    """55,008 + 13,376 in float16, in layer 7 at <bos>: of no other prompt's tokens is there a word with --redact."""
    result = stabilitykit("reproduce", "--export", str(tmp_path / "new"), "--redact", "--json", "--prompt", "Zanzibar")
    assert result.code == 0
    script = Path(json.loads(result.out)["script"])
    assert script == tmp_path / "new" / "repro.py"
    assert "Zanzibar" not in result.out + script.read_text()
    (printed,) = run_alone([script])
    assert printed == told(script)
    numbers = [line.rpartition(": ")[2] for line in printed]
    assert (sorted(numbers[:2], key=float), numbers[2:]) == (["13376", "55008"], ["inf", "68384"])


@pytest.mark.parametrize(
    "scenario", ["float16-overflow", "masked-row", "top-k-zero", "int8-without-scalers", "parameter-names"]
)
def test_every_scenario_can_be_exported(stabilitykit: Run, tmp_path: Path, scenario: str) -> None:
    stress = ["--stress", "65536"] if scenario == "float16-overflow" else []
    result = stabilitykit("reproduce", scenario, "--checkpoint", TINY, *stress, "--export", str(tmp_path / "new"))
    assert result.code == 0, result.err
    script = tmp_path / "new" / "repro.py"
    assert f"Written: {script}" in result.out
    assert " not finite: " in told(script)[-1]


def test_where_nothing_breaks_nothing_is_exported(stabilitykit: Run, tmp_path: Path) -> None:
    result = stabilitykit("reproduce", "--checkpoint", TINY, "--export", str(tmp_path / "new"))
    assert result.code == 2
    assert "Not reproduced" in result.out
    assert "Nothing broke" in result.err
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    result = stabilitykit("reproduce", "--checkpoint", TINY, "--export", str(tmp_path / "new"))
    assert (result.code, result.out) == (2, "")
    assert "not empty" in result.err


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
