"""`bound` from the command line: a verdict for every tensor, in a table by kind and as JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stabilitykit.records.bounds import Bounds
from stabilitykit.records.document import read_document, to_document

RANDOM = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512&context=64"
Run = Callable[..., Any]


@pytest.mark.slow
def test_json_has_every_site(stabilitykit: Run) -> None:
    result = stabilitykit("bound", RANDOM, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["dtype"] == "float16"
    sites = {one["site"]: one for one in found["sites"]}
    down = sites["layers.1.mlp.down_proj"]
    assert down["observed"] < down["found"] < down["bound"] < down["limit"] == 65504
    assert (down["label"], down["layer"], down["verdict"]) == ("down projection", 1, "safe for every prompt")
    assert sites["layers.1"]["found"] is None
    assert all(one["observed"] <= one["bound"] for one in sites.values() if one["observed"] is not None)


@pytest.mark.slow
def test_the_table_has_a_row_a_kind(stabilitykit: Run) -> None:
    result = stabilitykit("bound", RANDOM)
    assert "No prompt makes any of this checkpoint's" in result.out
    assert "query, half of it negated" not in result.out
    for label in ("embedding, scaled", "attention scores", "gate · up", "residual after MLP", "logits"):
        assert result.out.count(label) == 1


def test_what_it_refuses(stabilitykit: Run) -> None:
    result = stabilitykit("bound", "hf:somewhere")
    assert result.code == 2
    assert "'somewhere' is neither" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.slow
def test_a_report_of_bounds_alone(stabilitykit: Run, tmp_path: Path) -> None:
    new = tmp_path / "bounds"
    made = stabilitykit("bound", RANDOM, "--report", str(new))
    assert (made.code, made.err) == (0, "")
    text = (new / "report.md").read_text()
    assert "## Bounds for every prompt" in text
    assert "figures/bounds-by-layer.png" in text
    assert "No prompt makes any of this checkpoint's" in text
    read = read_document(new / "bounds.json", Bounds, "bounds")
    assert to_document(read) == json.loads((new / "bounds.json").read_text())
    assert {one.site for one in read.sites} >= {"layers.1.mlp.down_proj", "lm_head"}
    other = stabilitykit("bound", RANDOM + "&seed=7", "--report", str(new))
    assert other.code == 2
    assert "is about another checkpoint" in other.err
