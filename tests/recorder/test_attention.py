"""The softmax inside a fused kernel, against one computed whole in float64."""

from typing import Any

import pytest
import torch
from families import family_model
from torch import nn
from torch.nn import functional as F

from stabilitykit.recorder import attention, record
from stabilitykit.records import Recording, Softmax

TOKENS = torch.tensor([[2, 70, 71, 72, 73, 74, 75]])
CAUSAL = torch.ones(6, 9).tril(2).bool()
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": CAUSAL},
    "added": {"attn_mask": torch.zeros(2, 1, 6, 9).masked_fill(~CAUSAL, torch.finfo(torch.float32).min)},
    "one row for all": {"attn_mask": (torch.arange(9) < 7).expand(2, 1, 1, 9)},
    "scaled": {"scale": 0.5},
}


class Attends(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, **how)


def operands(dtype: torch.dtype = torch.float32, heads: int = 4) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return (
        torch.randn(2, 4, 6, 8).to(dtype),
        torch.randn(2, heads, 9, 8).to(dtype),
        torch.randn(2, heads, 9, 8).to(dtype),
    )


def seen(*given: torch.Tensor, fused_softmax: bool = True, **how: Any) -> Recording:
    model = Attends()
    with torch.inference_mode():
        bare = model(*given, **how)
        with record(model, fused_softmax=fused_softmax) as recording:
            out = model(*given, **how)
    assert torch.equal(bare, out)
    return recording


def softmax_of(recording: Recording) -> Softmax:
    found = [r for r in recording if r.softmax is not None]
    assert len(found) == 1
    assert found[0].softmax is not None
    return found[0].softmax


@pytest.mark.slow
@pytest.mark.parametrize("block", [1 << 24, 2 * 4 * 9 * 2])
@pytest.mark.parametrize("mask", MASKS)
def test_recomputed_statistics_are_those_of_the_whole_softmax(
    mask: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_ELEMENTS", block)  # two queries at a time: six are three blocks
    q, k, v = operands()
    found = softmax_of(seen(q, k, v, **MASKS[mask]))
    assert found.recomputed

    scores = q.double() @ k.double().transpose(2, 3) * MASKS[mask].get("scale", 8**-0.5)
    shown = MASKS[mask].get("attn_mask", torch.ones(6, 9).bool())
    if mask == "causal":
        shown = torch.ones(6, 9).tril().bool()
    if shown.dtype != torch.bool:
        shown = shown == 0
    shown = shown.expand(scores.shape)
    p = scores.masked_fill(~shown, -torch.inf).softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
    assert found.max_logit == pytest.approx(float(scores[shown].max()), rel=1e-5)
    assert found.entropy_mean == pytest.approx(entropy.mean(dim=(0, 2)).tolist(), rel=1e-5)
    assert found.entropy_min == pytest.approx(entropy.amin(dim=(0, 2)).tolist(), rel=1e-4, abs=1e-6)
    assert found.max_probability == pytest.approx(float(p.max()), rel=1e-5)
    assert (found.masked_rows, found.nan_rows, found.underflow_share) == (0, 0, 0.0)


def test_keys_shared_by_queries_are_found_for_each_head() -> None:
    q, k, v = operands(heads=2)
    shared = softmax_of(seen(q, k, v, enable_gqa=True))
    repeated = softmax_of(seen(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    assert shared.entropy_mean == pytest.approx(repeated.entropy_mean, rel=1e-5)


def test_a_row_that_sees_no_key_is_counted_as_fully_masked() -> None:
    shown = CAUSAL.clone()
    shown[3] = False
    found = softmax_of(seen(*operands(), attn_mask=shown))
    assert (found.masked_rows, found.nan_rows) == (2 * 4, 0)


def test_it_can_be_left_out() -> None:
    recording = seen(*operands(), fused_softmax=False)
    assert [r.softmax for r in recording] == [None] * len(recording)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_fused_and_eager_models_have_the_same_statistics(family: str) -> None:
    both = []
    for kind in ("eager", "sdpa"):
        model = family_model(family, attention=kind)
        with torch.inference_mode(), record(model) as recording:
            model(TOKENS)
        both.append([r.softmax for r in recording if r.softmax is not None])
    eager, fused = both
    assert [s.recomputed for s in eager + fused] == [False] * len(eager) + [True] * len(fused)
    for one, other in zip(eager, fused, strict=True):
        assert one.entropy_mean == pytest.approx(other.entropy_mean, rel=1e-4)
        assert one.max_logit == pytest.approx(other.max_logit, rel=1e-4)
        assert one.masked_rows == other.masked_rows == 0


def test_shares_and_counts_are_of_all_blocks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands()
    whole = softmax_of(seen(q * 100, k, v, is_causal=True))
    assert 0 < whole.underflow_share < 1
    monkeypatch.setattr(attention, "_ELEMENTS", 1)  # a query at a time
    assert softmax_of(seen(q * 100, k, v, is_causal=True)).underflow_share == whole.underflow_share
