"""Breaks planted in known places, in all three generations, are named with their own site, kind and value."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from stabilitykit.diagnosis import chain
from stabilitykit.models.gemma import Gemma, KVCache
from stabilitykit.recorder import record
from stabilitykit.records import Record, Recording

Small = Callable[..., Gemma]


def run(model: nn.Module, *inputs: torch.Tensor) -> Recording:
    with torch.inference_mode(), record(model) as recording:
        model(*inputs)
    return recording


def first_break(recording: Recording) -> Record:
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    return first


def plant_scores(model: Gemma) -> None:
    if model.config.query_key_norm:
        model.layers[1].self_attn.q_norm.weight.data.fill_(200.0)
        model.layers[1].self_attn.k_norm.weight.data.fill_(200.0)
    else:
        model.layers[1].self_attn.q_proj.weight.data *= 300
        model.layers[1].self_attn.k_proj.weight.data *= 300


def plant_gate_up(model: Gemma) -> None:
    model.layers[1].mlp.gate_proj.weight.data *= 600
    model.layers[1].mlp.up_proj.weight.data *= 600


def plant_down(model: Gemma) -> None:
    model.layers[1].mlp.up_proj.weight.data *= 400
    model.layers[1].mlp.down_proj.weight.data *= 2000


def plant_norm(model: Gemma) -> None:
    model.layers[1].input_layernorm.weight.data.fill_(40000.0)


def plant_logits(model: Gemma) -> None:
    model.norm.weight.data.fill_(10000.0)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data * 20, requires_grad=False)


PLANTS = {
    "scores": (plant_scores, "layers.1.self_attn/matmul.0", "matmul"),
    "gate · up": (plant_gate_up, "layers.1.mlp/mul.0", "mul"),
    "down_proj": (plant_down, "layers.1.mlp.down_proj", "matmul"),
    "norm": (plant_norm, "layers.1.input_layernorm", "cast"),
    "logits": (plant_logits, "lm_head", "matmul"),
}


@pytest.mark.parametrize("generation", [1, 2, 3])
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_break_is_named(small: Small, tokens: torch.Tensor, generation: int, plant: str) -> None:
    model = small(generation, "float16")
    assert run(model, tokens).first_break() is None
    damage, site, operator = PLANTS[plant]
    damage(model)
    outputs: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    recording = run(model, tokens)
    first = first_break(recording)
    assert (first.site, first.operator, first.broke.kind) == (site, operator, "overflow")
    assert first.broke.value is not None
    assert 65520 <= abs(first.broke.value) < 1e9
    assert first.broke.limit == 65504.0
    links = chain(recording)
    assert (links[0].event, links[0].site) == ("break", site)
    lost_layers = [number for number, output in enumerate(outputs) if not output.isfinite().all()]
    ends_there = plant == "logits" or (plant, generation) == ("scores", 2)  # whose soft-cap makes infinities finite
    assert lost_layers == ([] if ends_there else [1, 2])
    assert [link.layer for link in links if link.event == "layer"] == lost_layers


def test_the_chain_differs_with_the_break(small: Small, tokens: torch.Tensor) -> None:
    seen = set()
    for damage, _, _ in PLANTS.values():
        model = small(3, "float16")
        damage(model)
        seen.add(tuple((link.event, link.site) for link in chain(run(model, tokens))))
    assert len(seen) == len(PLANTS)


def test_value_and_operands_are_this_runs_own_combined_in_float32(small: Small, tokens: torch.Tensor) -> None:
    model = small(1, "float16")
    attended: list[torch.Tensor] = []

    def put(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, 3, 7] = 33024.0
        return output

    model.layers[1].self_attn.o_proj.register_forward_hook(put)
    model.layers[1].mlp.down_proj.register_forward_hook(put)
    model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda module, args: attended.append(args[0]))
    recording = run(model, tokens)
    first = first_break(recording)
    residual = float(attended[0][0, 3, 7])
    assert (first.site, first.operator, first.label) == ("layers.1", "add", "residual after MLP")
    assert (first.broke.row, first.broke.position, first.broke.channel, first.broke.count) == (0, 3, 7, 1)
    assert first.broke.operands == (residual, 33024.0)
    assert first.broke.operand_sites == ("layers.1/add.0", "layers.1.mlp.down_proj")
    assert first.broke.value == residual + 33024.0
    assert first.broke_at == 3 * 32 + 7


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        (lambda x: x / (x - x), "division-by-zero"),
        (lambda x: (x - x) / (x - x), "invalid"),
        (lambda x: torch.sqrt(-x), "invalid"),
        (lambda x: torch.rsqrt(x - x), "division-by-zero"),
        (lambda x: torch.log(x - x), "division-by-zero"),
        (lambda x: torch.exp(x * 20), "overflow"),
        (lambda x: x * 1000 * 1000, "overflow"),
        (lambda x: torch.prod(x * torch.tensor([3000, 3000, 0.001]).half(), -1, keepdim=True), "reduction"),
    ],
)
def test_kinds(operation: Callable[[torch.Tensor], torch.Tensor], kind: str) -> None:
    class Operation(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return operation(x)

    first = first_break(run(Operation(), torch.ones(1, 2, 3, dtype=torch.float16)))
    assert first.broke is not None
    assert first.broke.kind == kind
    assert first.broke.count == first.elements
    assert first.broke.position == 0


def test_a_row_masked_whole_is_told_from_an_overflow(small: Small, tokens: torch.Tensor) -> None:
    model = small(3)
    length = tokens.shape[1]
    mask = torch.full((1, 1, length, length), -math.inf).triu(1)
    mask[..., 2, :] = -math.inf
    with torch.inference_mode(), record(model) as recording:
        model(tokens, mask=mask)
    first = first_break(recording)
    assert (first.site, first.broke.kind, first.broke.position) == ("layers.0.self_attn/softmax.0", "masked-row", 2)
    assert first.softmax is not None
    assert first.softmax.masked_rows == 4  # one a head


def test_bad_weights_and_inputs_are_kinds_of_their_own(small: Small, tokens: torch.Tensor) -> None:
    model = small(2)
    model.layers[1].mlp.up_proj.weight.data[3, 4] = math.nan
    first = first_break(run(model, tokens))
    assert (first.site, first.broke.kind) == ("layers.1.mlp.up_proj", "weight")
    assert first.broke.operand_sites == ("layers.1.mlp.up_proj.weight",)
    first = first_break(run(nn.Linear(3, 3), torch.tensor([[1.0, math.inf, 0.0]])))
    assert first.broke.kind == "input"


def test_an_embedding_that_overflows_when_cast_is_a_bad_weight(small: Small, tokens: torch.Tensor) -> None:
    model = small(1, "float16")
    model.embed_tokens.weight.data[72, 9] = math.inf
    first = first_break(run(model, tokens))
    assert (first.site, first.broke.kind, first.broke.position) == ("embed_tokens/embedding.0", "weight", 3)


def test_the_culprit_token_is_the_earliest_position_that_broke(small: Small, tokens: torch.Tensor) -> None:
    model = small(1, "float16")
    model.embed_tokens.weight.data[73, 5] = 60000.0
    first = first_break(run(model, tokens))
    assert (first.site, first.broke.position, first.broke.channel) == ("embed_tokens", 4, 5)
    assert first.lost_positions == 1
    assert first.lost_channels == 1


def test_positions_are_absolute_and_rows_told_apart_when_a_later_step_breaks(small: Small) -> None:
    model = small(3, "float16")
    model.embed_tokens.weight.data[73, 5] = 60000.0
    cache = KVCache(model.config, batch=2, length=4, dtype=model.dtype)
    with torch.inference_mode(), record(model) as recording:
        model(torch.tensor([[2, 70, 71], [2, 72, 70]]), cache=cache)
        model(torch.tensor([[70], [73]]), cache=cache)
    first = first_break(recording)
    assert (first.step, first.site, first.broke.row, first.broke.position) == (1, "embed_tokens", 1, 3)
    assert first.broke.token == 73


@pytest.mark.parametrize("generation", [1, 2, 3])
@pytest.mark.parametrize("gamma", [2.0**15, 2.0**17])
def test_rescale_breaks_any_model_on_demand(small: Small, tokens: torch.Tensor, generation: int, gamma: float) -> None:
    assert run(small(generation, "float16"), tokens).first_break() is None
    assert run(small(generation, "float16", gamma), tokens).first_break() is not None
    assert run(small(generation, "float32", gamma), tokens).first_break() is None


def test_at_module_level_the_module_is_found_and_the_cause_left_open(small: Small, tokens: torch.Tensor) -> None:
    model = small(3, "float16")
    plant_down(model)
    with torch.inference_mode(), record(model, level="modules") as recording:
        model(tokens)
    first = first_break(recording)
    assert (first.site, first.broke.kind, first.broke.value) == ("layers.1.mlp.down_proj", "unresolved", None)
