"""Models in gemma_pytorch's classes: its names, its caches as bare tensors, its sampler inside the model."""

from typing import Any

import pytest
import torch
from gemma_pytorch_like import GemmaForCausalLM
from written import gemma_pytorch_state

from stabilitykit.checkpoints import random_checkpoint
from stabilitykit.diagnosis import by_layer, cause, chain
from stabilitykit.recorder import record

SHAPE = "layers=2&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&query_scalar=16&vocabulary=512"
SPECS = {
    1: f"random:gemma-2b?{SHAPE}",
    2: f"random:gemma2-2b?{SHAPE}",
    3: f"random:gemma3-270m?{SHAPE}",
}
LENGTH = 8


def made(generation: int, dtype: torch.dtype) -> GemmaForCausalLM:
    checkpoint = random_checkpoint(SPECS[generation])
    model = GemmaForCausalLM(checkpoint.config)
    state = {name: t for name, t in gemma_pytorch_state(checkpoint).items() if "freqs" not in name}
    model.load_state_dict(state)
    return model.eval().to(dtype)


def run(model: GemmaForCausalLM, caches: Any, tokens: list[int], start: int) -> torch.Tensor:
    positions = torch.arange(start, start + len(tokens))
    mask = torch.triu(torch.full((1, 1, LENGTH, LENGTH), -2.3819763e38), diagonal=1).index_select(2, positions)
    torch.manual_seed(0)
    _, logits = model(
        input_token_ids=torch.tensor([tokens]),
        input_positions=positions,
        kv_caches=caches,
        mask=mask,
        output_positions=torch.tensor([len(tokens) - 1]),
    )
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_the_same_bits_the_sites_named_and_the_positions_absolute(generation: int, dtype: torch.dtype) -> None:
    model = made(generation, dtype)
    caches = model.caches(LENGTH, dtype)
    bare = [run(model, caches, [2, 70, 71], 0), run(model, caches, [72], 3)]
    caches = model.caches(LENGTH, dtype)
    with record(model) as recording:
        recorded = [run(model, caches, [2, 70, 71], 0), run(model, caches, [72], 3)]
    assert all(torch.equal(a, b) for a, b in zip(bare, recorded, strict=True))
    assert recording.first_break() is None
    assert recording.header.starts == (0, 3)
    labels = {r.site: r.label for r in recording}
    assert labels["embedder"] == "embedding"
    assert labels["/mul.0"] == "embedding, scaled"
    assert labels["layers.1.self_attn.qkv_proj"] == "query, key and value projection"
    assert labels["layers.1/add.0"] == "residual after attention"
    assert labels["layers.1"] == "residual after MLP"
    assert labels["sampler/matmul.0"] == "logits"
    assert recording.at("layers.1", 1).amax_position == 3
    assert sum(r.softmax is not None for r in recording) == 2 * (2 + 1)  # layers and sampler, twice
    assert {row.name for row in by_layer(recording)} >= {"embed", "0", "1", "norm", "sampler"}


def test_a_break_in_the_first_step_is_no_break_of_the_cache_in_the_second() -> None:
    model = made(3, torch.float16)
    model.model.layers[0].post_feedforward_layernorm.weight.data.fill_(6e4)
    caches = model.caches(LENGTH, torch.float16)
    with record(model) as recording:
        with pytest.raises(RuntimeError, match="probability tensor"):
            run(model, caches, [2, 70, 71], 0)
        with pytest.raises(RuntimeError, match="probability tensor"):
            run(model, caches, [72], 3)
    first = recording.first_break()
    assert first is not None
    assert (first.site, first.step) == ("layers.0.post_feedforward_layernorm", 0)
    kinds = {r.broke.kind for r in recording if r.broke is not None}
    assert kinds == {"overflow"}
    assert cause(recording).name == "range"
    assert "logits" in [link.event for link in chain(recording)]


def test_what_an_early_token_left_in_a_cache_is_no_bad_input_of_a_later_step() -> None:
    model = made(3, torch.float16)
    model.embedder.weight.data[77, 5] = 1.2e4  # times √32 it is past float16's range
    caches = model.caches(LENGTH, torch.float16)
    with record(model) as recording:
        for tokens, start in (([2, 77], 0), ([70], 2)):
            with pytest.raises(RuntimeError, match="probability tensor"):
                run(model, caches, tokens, start)
    assert any(r.step == 1 and r.lost for r in recording)  # by way of the cache alone
    assert [(r.site, r.step) for r in recording if r.broke is not None] == [("/mul.0", 0)]
