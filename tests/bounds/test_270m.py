"""The real weights: a prompt under its bounds, and the sizes that were computed from them in another way."""

from dataclasses import replace

import pytest
import torch

from stabilitykit.bounds import mlp
from stabilitykit.bounds.bound import bound_sites
from stabilitykit.checkpoints import Checkpoint
from stabilitykit.diagnosis.bounds import by_kind, folded
from stabilitykit.models.gemma import build
from stabilitykit.recorder import record
from stabilitykit.records.bounds import SiteBound

PROMPT = torch.tensor([[2, 818, 5279, 529, 7001, 563, 9079, 236761, 108, 236777, 1133]])


@pytest.fixture(scope="module")
def bounds(checkpoint_270m: Checkpoint) -> list[SiteBound]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp, "_REFINED", 4)  # of 48: seconds that the sizes below do not need
        return bound_sites(checkpoint_270m, "float32")


def test_a_prompt_stays_under_every_bound(checkpoint_270m: Checkpoint, bounds: list[SiteBound]) -> None:
    model = build(checkpoint_270m)
    with torch.inference_mode(), record(model, formats=()) as recording:
        model(PROMPT)
    known = {one.site: one.bound for one in bounds}
    seen = [one for one in recording if one.site in known and one.amax is not None]
    assert len(seen) > 500
    assert [one.site for one in seen if one.amax is not None and one.amax > known[one.site]] == []
    outside = {one.site for one in recording if one.site not in known}
    assert all("norm/" in site or site.startswith("rotary_emb/") for site in outside)


def test_sizes_are_those_that_the_weights_were_said_to_have(bounds: list[SiteBound]) -> None:
    size = {row.worst.kind: row.worst.bound for row in by_kind(bounds)}
    assert size["layers.*.input_layernorm"] == pytest.approx(5_920, rel=1e-3)
    assert max(size[f"layers.*.{name}_proj"] for name in _PROJECTIONS) < 12_000
    assert size["layers.*.self_attn/matmul.0"] < 56_200
    assert size["layers.*.mlp/mul.0"] == pytest.approx(1.3e6, rel=0.02)
    assert size["layers.*.mlp.down_proj"] < 792_000
    assert size["layers.*"] == pytest.approx(448_000, rel=0.01)
    assert size["norm"] < 7_620
    assert size["lm_head"] < 2_710
    late = next(one for one in bounds if one.site == "layers.15.mlp/mul.0")
    assert late.bound == pytest.approx(34_000, rel=0.02)


_PROJECTIONS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")


def test_a_row_a_kind_and_its_worst_verdict(bounds: list[SiteBound]) -> None:
    stored = [replace(one, dtype="float16") for one in bounds]
    rows = {row.worst.kind: row for row in by_kind(stored)}
    assert rows["layers.*.mlp.gate_proj"].verdict == "safe for every prompt"
    assert rows["layers.*"].verdict == "open"
    seen = [replace(one, observed=70_000.0) if one.site == "layers.7" else one for one in stored]
    broken = next(row for row in by_kind(seen) if row.worst.kind == "layers.*")
    assert (broken.verdict, broken.share, broken.sites) == ("reachable by a prompt", 1, 18)
    reached = [replace(one, found=65_520.0) if one.site == "layers.2.mlp/mul.0" else one for one in stored]
    assert next(one for one in reached if one.site == "layers.2.mlp/mul.0").verdict == "reachable by a hidden state"
    shown = {row.worst.kind for row in folded(by_kind(stored))}
    assert "layers.*.self_attn/neg.0" not in shown
    assert {"layers.*", "layers.*/add.0", "layers.*.mlp/mul.0", "layers.*.self_attn.q_proj"} <= shown
