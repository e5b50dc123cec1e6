"""Bounds: what each verdict means, and on disk."""

import json
from pathlib import Path

import pytest
from bounded import SITES, bounds, site
from swept import sweep

from stabilitykit.errors import MisuseError
from stabilitykit.records.bounds import Bounds, Largest, with_largest
from stabilitykit.records.document import read_document


def test_a_verdict_says_what_is_known() -> None:
    assert [one.verdict for one in SITES] == [
        "safe for every prompt", "reachable by a hidden state", "safe for every prompt", "open",
        "reachable by a prompt", "open",
    ]  # fmt: skip
    # what rounds to the largest number is in range, what rounds past it is not
    assert site("norm", 65504.0).verdict == "safe for every prompt"
    assert site("norm", 65505.0).verdict == "open"
    assert site("norm", 70000.0, observed=65519.0).verdict == "open"
    assert site("norm", 70000.0, observed=65520.0).verdict == "reachable by a prompt"
    assert [one.kind for one in SITES][:3] == ["embed_tokens", "layers.*.mlp.down_proj", "layers.*"]


def test_bounds_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = sweep(tmp_path / "reports", [])
    assert results.bounds is None
    results.write_finding(bounds())
    assert results.bounds == bounds()
    raw = json.loads((tmp_path / "reports/bounds.json").read_text())
    assert raw["sites"][-1]["bound"] == "inf"  # JSON has no infinity
    with pytest.raises(MisuseError, match="Choose another folder"):
        results.write_finding(bounds(sha256="cd" * 32))


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"schema": 1}), json.dumps({"schema": 9})])
def test_a_file_that_holds_no_bounds_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bounds.json").write_text(text)
    with pytest.raises(MisuseError, match=r"cannot be read as bounds|has schema 9"):
        read_document(tmp_path / "bounds.json", Bounds, "bounds")


def test_the_largest_are_entered_by_site_and_what_passes_the_end_is_said() -> None:
    seen = {"lm_head": Largest(3.0, prompt="text 1"), "layers.1": Largest(7e4, prompt="text 2, token 0")}
    found = with_largest(SITES, "observed", seen)
    assert [one.observed for one in found] == [None, None, None, None, 7e4, 3.0]
    assert [one.prompt for one in found] == [None, None, None, None, "text 2, token 0", None]
    assert found[1].found == 66_000.0
    states = with_largest(SITES, "found", {"layers.1": Largest(7e4, state=(1.0, 2.0)), "lm_head": Largest(1.0)})
    assert [one.state for one in states][-2:] == [(1.0, 2.0), None]
    assert states[1].found is None
