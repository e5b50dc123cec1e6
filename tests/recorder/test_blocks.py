"""A tensor that is computed by blocks of queries is recorded as the one it would have been."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stabilitykit.models.gemma import Gemma, query_blocks
from stabilitykit.recorder import record
from stabilitykit.records import Record, Recording

Small = Callable[..., Gemma]
LENGTH = 23
CLOSE: dict[str, Any] = {"rel": 1e-4, "abs": 1e-6}


def run(model: Gemma, **options: Any) -> Recording:
    ids = torch.randint(262, 360, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), record(model, position_peaks=True, **options) as recording:
        model(ids)
    return recording


def by_blocks(monkeypatch: pytest.MonkeyPatch, scores: int = 500) -> None:
    monkeypatch.setattr(query_blocks, "WHOLE", scores)
    monkeypatch.setattr(query_blocks, "BLOCK", scores)


def is_of_scores(record: Record) -> bool:
    return record.shape[-2:] == (LENGTH, LENGTH)


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_every_record_is_that_of_the_whole(small: Small, monkeypatch: pytest.MonkeyPatch, generation: int) -> None:
    model = small(generation, "float32")
    whole = run(model)
    by_blocks(monkeypatch)
    parts = run(model)
    assert [r.site for r in parts] == [r.site for r in whole]
    assert [r.shape for r in parts] == [r.shape for r in whole]
    scores = 0
    for found, expected in zip(parts, whole, strict=True):
        if expected.masked or not is_of_scores(expected):  # else the whole has later keys too
            assert found.amax == pytest.approx(expected.amax, **CLOSE), expected.site
        if is_of_scores(expected):
            scores += 1
            assert found.elements < expected.elements  # keys that no query of a block may see are left out
            if expected.masked:
                assert found.elements - found.masked == expected.elements - expected.masked  # and no others
        else:
            assert (found.position_amax or ()) == pytest.approx(expected.position_amax or (), **CLOSE), expected.site
            assert found.elements == expected.elements
            place = (expected.amax_row, expected.amax_position, expected.amax_channel)
            assert (found.amax_row, found.amax_position, found.amax_channel) == place
            assert found.rms == pytest.approx(expected.rms, **CLOSE)
            assert sum(found.exponents) == pytest.approx(sum(expected.exponents), abs=2)
        if expected.masked or expected.operator == "softmax":
            assert (found.position_amax or ()) == pytest.approx(expected.position_amax or (), **CLOSE), expected.site
        if expected.softmax is not None:
            assert found.softmax is not None
            assert found.softmax.entropy_mean == pytest.approx(expected.softmax.entropy_mean, **CLOSE)
            assert found.softmax.entropy_min == pytest.approx(expected.softmax.entropy_min, **CLOSE)
            assert found.softmax.max_logit == pytest.approx(expected.softmax.max_logit, **CLOSE)
            assert found.softmax.underflow_share == expected.softmax.underflow_share
    assert scores >= 12


def test_a_peak_is_found_in_its_row_position_and_channel(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked scores hold in both runs the same numbers, so that the peaks' places can be compared."""
    model = small(3, "float32")
    whole = run(model)
    by_blocks(monkeypatch)
    parts = run(model)
    for site in ("layers.0.self_attn/add.2", "layers.1.self_attn/add.2", "layers.2.self_attn/softmax.0"):
        found, expected = parts.at(site), whole.at(site)
        place = (expected.amax_row, expected.amax_position, expected.amax_channel)
        assert (found.amax_row, found.amax_position, found.amax_channel) == place
        assert found.minimum == pytest.approx(expected.minimum, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("scores", [1, 500])
def test_a_break_in_the_scores_is_one_break_at_its_place(
    small: Small, monkeypatch: pytest.MonkeyPatch, scores: int
) -> None:
    model = small(1, "float16")
    attention = model.layers[1].self_attn
    attention.q_proj.weight.mul_(350.0)
    attention.k_proj.weight.mul_(350.0)
    expected = run(model).first_break()
    assert expected is not None
    assert expected.broke is not None
    by_blocks(monkeypatch, scores)
    found = run(model).first_break()
    assert found is not None
    assert found.broke is not None
    assert found.site == expected.site == "layers.1.self_attn/matmul.0"
    query, key = found.broke.index[-2:]
    assert found.broke.position == max(query, key)
    assert found.broke.channel == key
    assert key <= query or scores > 1
    assert found.broke.kind == "overflow"
    assert found.broke.operand_sites == expected.broke.operand_sites
    assert found.broke.count == found.positive_inf + found.negative_inf + found.nan
    assert 0 < found.broke.count <= expected.broke.count
    assert 0 < found.lost_positions <= expected.lost_positions
    assert found.lost_channels <= expected.lost_channels


def test_an_element_that_is_watched_is_found_in_its_block(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    site, place = "layers.0.self_attn/mul.4", (1, 2, 20, 18)
    index = ((place[0] * 4 + place[1]) * LENGTH + place[2]) * LENGTH + place[3]
    model = small(1, "float32")
    (expected,) = run(model, watch=[(site, index)]).header.watched
    by_blocks(monkeypatch)
    (found,) = run(model, watch=[(site, index)]).header.watched
    assert found[:2] == expected[:2] == (site, index)
    assert found[2] == pytest.approx(expected[2], **CLOSE)


def test_what_follows_the_blocks_knows_what_they_made(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output projection of a layer whose values overflow names the product of all blocks as its operand."""
    model = small(3, "float16")
    model.layers[0].self_attn.o_proj.weight.fill_(3e4)
    by_blocks(monkeypatch)
    broken = run(model).first_break()
    assert broken is not None
    assert broken.broke is not None
    assert broken.site == "layers.0.self_attn.o_proj"
    assert broken.broke.operand_sites[0] == "layers.0.self_attn/matmul.1"


def test_a_prompt_that_continues_a_cache(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    from stabilitykit.models.gemma import KVCache

    model = small(3, "float32")
    ids = torch.randint(262, 360, (1, LENGTH), generator=torch.Generator().manual_seed(0))

    def peaks() -> dict[str, float]:
        cache = KVCache(model.config, batch=1, length=LENGTH, dtype=model.dtype)
        with torch.no_grad(), record(model) as recording:
            model(ids[:, :9], cache=cache)
            model(ids[:, 9:], cache=cache)
        return {f"{r.step} {r.site}": r.amax if r.amax is not None else math.nan for r in recording}

    whole = peaks()
    by_blocks(monkeypatch, 100)
    parts = peaks()
    assert list(parts) == list(whole)
    masked_or_later = [name for name in whole if not name.endswith(("matmul.0", "mul.4"))]
    assert [parts[name] for name in masked_or_later] == pytest.approx([whole[n] for n in masked_or_later], **CLOSE)
