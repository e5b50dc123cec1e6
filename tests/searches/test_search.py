"""Whole searches in models in which it is known what is to be found."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from planted import BOS, FIRST, SECOND, dangerous, dangerous_pair
from remedied import SPECS, rescale

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.diagnosis.search import how_measured, shortest, with_bos
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import build
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.records.document import from_document, to_document
from stabilitykit.records.search import Search
from stabilitykit.searches import search


def breaks(opened: Checkpoint, tokens: tuple[int, ...]) -> bool:
    with torch.inference_mode():
        return not build(opened, dtype="float16")(torch.tensor([tokens])).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "sieve"), [(1, "float32"), (2, "float32"), (3, "bfloat16")])
def test_a_dangerous_token_is_the_worst_everywhere(generation: int, sieve: str) -> None:
    opened = dangerous(generation, FIRST, 80_000.0)
    found = search(opened, sieve=sieve)
    assert [scan.name for scan in found.scans] == ["alone", "after <bos>", "inside a text"]
    for scan in found.scans:
        worst, *others = scan.worst
        assert (worst.token, worst.kind) == (FIRST, "word")
        assert worst.value == pytest.approx(80_000, rel=1e-4)
        assert worst.headroom == pytest.approx(math.log2(65504 / 80_000), abs=1e-3)
        assert all((other.headroom or 0) > 5 for other in others)
        assert (scan.scanned, scan.beyond, scan.not_finite) == (512, 1, 0)
        assert sum(count for _, count in scan.bins) == 512
        assert sum(kind.count for kind in scan.kinds) == 512
        assert scan.moved < 0.1
        assert not any(peak.is_text for peak in scan.by_ids)
        assert BOS not in {peak.token for peak in scan.worst}
    without, with_ = (next(find for find in found.finds if find.bos == bos) for bos in (False, True))
    assert without.tokens == (FIRST,)
    assert with_.tokens == (BOS, FIRST)
    assert without.breaks
    assert with_.breaks
    assert with_.broken_position == 1
    assert "embed_tokens" in with_.sentence
    assert found.breaking == (without, with_)


def test_two_tokens_that_break_only_together_are_found() -> None:
    opened = dangerous_pair()
    found = search(opened, bos=False)
    assert [step.length for step in found.steps] == [1, 2]
    find = found.finds[0]
    assert find.tokens == (FIRST, SECOND)
    assert find.value == pytest.approx(75_000, rel=1e-3)
    assert find.breaks
    assert (find.broken_site, find.broken_layer, find.broken_position) == ("layers.0/add.0", 0, 1)
    assert breaks(opened, find.tokens)
    for tokens in ((FIRST,), (SECOND,), (SECOND, FIRST), (SECOND, SECOND), (FIRST, FIRST)):
        assert not breaks(opened, tokens)
    said = shortest(found, bos=False) or ""
    assert "the shortest prompt found to break is 'F' 'P' (2 tokens). None is shorter: alone no token" in said
    assert "comes nearer than 0.39 bits. float16 overflows in layer 0" in said
    longer = replace(found, finds=(replace(find, tokens=(FIRST, FIRST, SECOND)),))
    assert "None is shorter" not in (shortest(longer, bos=False) or "")
    part = replace(found, vocabulary=1000)
    assert "(2 tokens). float16 overflows in layer 0" in (shortest(part, bos=False) or "")
    assert found.bos is None
    assert with_bos(found) is None


def test_every_find_is_read_from_its_text() -> None:
    opened = dangerous_pair()
    found = search(opened, length=3)
    tokenizer = Tokenizer(opened.vocabulary)
    assert {find.bos for find in found.finds} == {False, True}
    for number, find in enumerate(found.finds, start=1):
        assert find.text is not None
        assert find.file == f"{number}.txt"
        assert tokenizer.encode(find.text, bos=find.bos) == list(find.tokens)
        assert breaks(opened, find.tokens) == find.breaks


@pytest.mark.slow
def test_where_bos_breaks_alone_it_is_said_and_left_out() -> None:
    opened = dangerous(3, BOS, 80_000.0)
    found = search(opened, length=2)
    assert found.bos is not None
    assert found.bos.breaks
    assert found.breaking[0] == found.bos
    assert (with_bos(found) or "").startswith(
        "With <bos> every prompt breaks, whatever follows, because <bos> alone does."
    )
    assert not any(find.bos or find.breaks for find in found.finds)
    assert found.scans[0].by_ids[0].token == BOS
    asked = search(opened, bos=True, limit=300)
    assert asked.finds == ()
    assert [scan.name for scan in asked.scans] == ["after <bos>"]


def test_a_rescaled_checkpoint_leaves_room() -> None:
    opened = rescale(dangerous_pair(), 0.25)
    found = search(opened, bos=False, length=4)
    assert found.breaking == ()
    nearest = found.finds[0]
    assert nearest.tokens == (FIRST, FIRST, FIRST, SECOND)  # attention is even: three quarters and not half
    assert nearest.value == pytest.approx(1.75 * 50_000 / 4, rel=1e-3)
    assert nearest.headroom == pytest.approx(math.log2(65504 / 21_875), abs=1e-2)
    said = shortest(found, bos=False) or ""
    assert "no prompt that was tried, up to 4 tokens long, breaks in float16" in said
    assert "'F' 'F' 'F' 'P' (4 tokens)" in said
    assert "1.58 bits below the float16 maximum, 65,504" in said


def test_bfloat16_does_not_break_where_float16_does() -> None:
    found = search(dangerous(2, FIRST, 80_000.0), dtype="bfloat16", bos=False, limit=320, length=1)
    assert found.breaking == ()
    assert found.finds[0].tokens == (FIRST,)
    assert found.finds[0].headroom == pytest.approx(111.7, abs=0.1)


def test_a_limit_is_told() -> None:
    found = search(random_checkpoint(SPECS[1]), bos=False, limit=270, length=1)
    assert {scan.scanned for scan in found.scans} == {270}
    assert {find.tokens[0] for find in found.finds} <= set(range(270))
    assert "For the first 270 of 512 tokens" in how_measured(found)


def test_where_no_token_is_text_nothing_is_tried() -> None:
    found = search(random_checkpoint(SPECS[1]), limit=4)
    assert (found.finds, found.steps) == ((), ())
    assert all(len(scan.by_ids) == 4 and not scan.worst for scan in found.scans)
    for bos, how in ((False, "Without"), (True, "With")):
        assert shortest(found, bos) == f"{how} <bos> no prompt was tried: none of the tokens scanned is text by itself."


def test_a_search_is_read_as_it_was_written() -> None:
    found = search(random_checkpoint(SPECS[2]), limit=280, length=1)
    assert from_document(Search, json.loads(json.dumps(to_document(found), allow_nan=False))) == found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beam": 0}, "beam must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"limit": -1}, "limit must be at least 1, got -1"),
        ({"length": 8192}, "length must be at most 8,191, .* got 8,192"),
    ],
)
def test_a_search_that_cannot_be_meant_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MisuseError, match=said):
        search(random_checkpoint(SPECS[1]), **options)
