"""Blocks of queries cover every score that counts, once, and attention by blocks is the same function."""

import math

import pytest
import torch

from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.models.gemma import KVCache, build, query_blocks
from stabilitykit.models.gemma.query_blocks import query_blocks as blocks_of

SHAPE = "layers=3&hidden_size=32&feed_forward=64&heads=4&head_dim=16&vocabulary=512"
SPECS = {
    1: f"random:gemma-2b?{SHAPE}&kv_heads=1",
    2: f"random:gemma2-2b?{SHAPE}&kv_heads=2&window=7",
    3: f"random:gemma3-270m?{SHAPE}&kv_heads=2&window=7&global_every=2",
}


def small(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    monkeypatch.setattr(query_blocks, "WHOLE", scores)
    monkeypatch.setattr(query_blocks, "BLOCK", scores)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("past", [0, 9])
@pytest.mark.parametrize("scores", [1, 64, 400])
def test_every_score_that_a_query_may_see_is_in_one_block(
    monkeypatch: pytest.MonkeyPatch, window: int | None, past: int, scores: int
) -> None:
    small(monkeypatch, scores)
    queries, keys = 31, 31 + past
    seen = torch.zeros(queries, keys, dtype=torch.int64)
    for block in blocks_of(2, queries, keys, window):
        seen[block.start : block.stop, block.first_key : block.last_key] += 1
        assert 2 * block.scores <= scores or block.stop - block.start == 1
    query, key = torch.arange(past, keys)[:, None], torch.arange(keys)
    allowed = (key <= query) & (key > query - (window or math.inf))
    assert seen.max() == 1
    assert bool((seen[allowed] == 1).all())


def test_what_fits_whole_is_no_block() -> None:
    assert blocks_of(4, 4096, 4096, None) == ()
    assert len(blocks_of(4, 32768, 32768, None)) > 100
    assert len(blocks_of(4, 32768, 32768, 512)) < 20  # a window's keys are few


@pytest.mark.parametrize("generation", SPECS)
@pytest.mark.parametrize("scores", [1, 90, 700])
def test_logits_by_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, generation: int, scores: int) -> None:
    """In float64, up to the order of sums; with padding, and continued from a cache."""
    model = build(random_checkpoint(SPECS[generation]), dtype="float64")
    tokens = torch.randint(300, 500, (2, 29), generator=torch.Generator().manual_seed(0))
    padding = torch.ones(2, 29, dtype=torch.bool)
    padding[1, :6] = False

    def run() -> list[torch.Tensor]:
        cache = KVCache(model.config, batch=2, length=29, dtype=model.dtype)
        parts = [model(tokens[:, :17], cache=cache), model(tokens[:, 17:], cache=cache)]
        return [model(tokens), torch.cat(parts, 1), model(tokens, padding=padding)[padding]]

    whole = run()
    small(monkeypatch, scores)
    for expected, found in zip(whole, run(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(layer.self_attn.query_block is None for layer in model.layers)
