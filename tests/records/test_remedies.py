"""A ranking on disk: read as it was written, or refused in a sentence."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scored import ranking, score
from swept import sweep

from stabilitykit.errors import MisuseError
from stabilitykit.formats import FLOAT16
from stabilitykit.records.document import read_document
from stabilitykit.records.remedies import Ranking


def test_a_ranking_is_read_as_it_was_written(tmp_path: Path) -> None:
    results = sweep(tmp_path / "reports", [])
    assert results.ranking is None
    results.write_finding(ranking())
    assert results.ranking == ranking()
    assert ranking()["bfloat16"].kl_mean == 1e-3
    assert ranking().repaired == ranking()["scaling"]
    assert replace(ranking(), scores=()).repaired is None
    assert ranking().scaled_headroom == FLOAT16.headroom(25_000.0)
    with pytest.raises(KeyError):
        ranking()["another"]


def test_a_ranking_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    results = sweep(tmp_path / "reports", [])
    with pytest.raises(MisuseError, match=r"is about another checkpoint: toy .* Choose another folder"):
        results.write_finding(ranking(sha256="cd" * 32))
    assert results.ranking is None


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"schema": 2}), json.dumps({"schema": 7})])
def test_what_is_no_ranking_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "remedies.json"
    path.write_text(text)
    with pytest.raises(MisuseError, match=r"cannot be read as a ranking|has schema 7, but this version reads schema 2"):
        read_document(path, Ranking, "a ranking")


def test_numbers_that_are_not_known_stay_unknown(tmp_path: Path) -> None:
    results = sweep(tmp_path / "reports", [])
    results.write_finding(ranking(score("float16", None), carried="float16"))
    found = results.ranking
    assert found is not None
    assert found.repaired is not None
    assert found.repaired.kl_mean is None
