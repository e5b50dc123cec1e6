"""What no dtype cures: numbers that are none, in weights, inputs and caches; labels; and adapters that are merged."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from truth.decoders import IDS, residual
from truth.models import decoder

import stabilitykit as sk
from stabilitykit.records.trials import Distance, Trial

HALF = torch.float16
NAN = math.nan
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def llama(dtype: torch.dtype = HALF) -> Any:
    return copy.deepcopy(decoder("llama")).to(dtype)


def logits(model: Any, **given: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**given).logits.float()
    return found


def rounded(model: Any) -> Any:
    """In float16 as `from_pretrained` makes it, which keeps RoPE's frequencies in float32."""
    made = copy.deepcopy(model)
    for one in made.parameters():
        one.data = one.data.half()
    return made


def same(trial: Trial, by_hand: Tensor, expected: Tensor) -> None:
    """Cures it, and is as far from float32 as the change by hand."""
    assert trial.cured
    assert trial.distance is not None
    far = (by_hand - expected).abs().max() / expected.abs().max()
    assert trial.distance.error_max == pytest.approx(float(far), rel=1e-3, abs=1e-6)


def test_a_weight_that_is_nan_is_named_by_element_and_alone_to_blame() -> None:
    model = llama()
    model.get_parameter(O_PROJ).data[7, 5] = NAN
    found = sk.diagnose(model, input_ids=IDS)
    trial = found["weight replaced"]
    assert "layers.1.self_attn.o_proj.weight[7, 5], which is NaN" in trial.summary
    assert found.cures == (trial,)
    assert math.isnan(model.get_parameter(O_PROJ)[7, 5])  # the caller's is left
    by_hand = copy.deepcopy(model)
    exec(trial.command, {"model": by_hand})
    assert by_hand.get_parameter(O_PROJ)[7, 5] == 0
    same(trial, logits(by_hand, input_ids=IDS), logits(copy.deepcopy(by_hand).float(), input_ids=IDS))
    assert "nothing else is to blame" in found.advice
    assert "It is not the format" in found.advice


def test_of_several_the_first_is_named_and_all_are_counted_and_replaced() -> None:
    model = llama()
    model.get_parameter(O_PROJ).data[7, 5:8] = NAN
    model.get_parameter("lm_head.weight").data[3, 3] = math.inf
    found = sk.diagnose(model, input_ids=IDS)
    trial = found["weight replaced"]
    assert "4 elements of 2 tensors" in trial.summary
    by_hand = copy.deepcopy(model)
    exec(trial.command, {"model": by_hand})
    same(trial, logits(by_hand, input_ids=IDS), logits(copy.deepcopy(by_hand).float(), input_ids=IDS))


def test_a_weight_that_only_float16_does_not_hold_is_told_in_float32_and_moved() -> None:
    """70,000 in up_proj: half of it fits, and down_proj takes the other half."""
    model = llama(torch.float32)
    model.get_parameter(UP).data[7, 9] = 70000.0
    model.get_parameter("model.embed_tokens.weight").data[:, 9] = 1e-5
    model.get_parameter("model.layers.0.self_attn.o_proj.weight").data[9] = 0
    expected = logits(model, input_ids=IDS)
    found = sk.diagnose(model, input_ids=IDS)
    assert "layers.0.mlp.up_proj.weight[7, 9]" in found["weight replaced"].summary
    assert "70,000 in float32" in found["weight replaced"].summary
    moved = copy.deepcopy(model)
    moved.get_parameter(UP).data /= 2
    moved.get_parameter(DOWN).data *= 2
    same(found["up and down factors"], logits(rounded(moved), input_ids=IDS), expected)
    wide = rounded(model)
    layer = wide.model.layers[0].mlp
    layer.up_proj = Widened(model.model.layers[0].mlp.up_proj)
    same(found["weight in float32"], logits(wide, input_ids=IDS), expected)


class Widened(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.linear(x.float())
        return made.half()


def test_a_reference_says_what_a_rounded_weight_was() -> None:
    wide = llama(torch.float32)
    wide.get_parameter(UP).data[7, 9] = 70000.0
    model = copy.deepcopy(wide).half()
    found = sk.diagnose(model, input_ids=IDS, reference=wide)
    assert "70,000 in float32" in found["weight replaced"].summary
    assert found["float32"].cured
    assert found["bfloat16"].finite  # made of the reference, and not of what is infinite already


def test_an_input_that_is_nan_is_named_by_element() -> None:
    model = llama()
    vectors = model.model.embed_tokens(IDS).detach()
    vectors[0, 3, 5] = NAN
    found = sk.diagnose(model, inputs_embeds=vectors)
    trial = found["input replaced"]
    assert "inputs_embeds[0, 3, 5], which is NaN" in trial.summary
    clean = vectors.nan_to_num(0.0)
    expected = logits(copy.deepcopy(model).float(), inputs_embeds=clean.float())
    same(trial, logits(model, inputs_embeds=clean), expected)
    assert math.isnan(vectors[0, 3, 5])
    assert "and not the model" in found.advice


def filled(model: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    return cache


def test_slots_of_a_cache_that_are_nan_are_filled_with_zeros_in_a_copy() -> None:
    model = llama()
    cache = filled(model)
    values: Any = cache.layers[1]
    values.values[0, 0, 2, 5] = NAN
    before = values.values.clone()
    token = torch.tensor([[20]])
    found = sk.diagnose(model, input_ids=token, past_key_values=cache)
    assert torch.equal(values.values, before) or bool(values.values.isnan().any())
    assert values.values.shape == before.shape
    clean, wide = copy.deepcopy(cache), copy.deepcopy(cache)
    for held, dtype in ((clean, HALF), (wide, torch.float32)):
        for layer in held.layers:
            kept: Any = layer
            kept.keys, kept.values = kept.keys.to(dtype), kept.values.nan_to_num(0.0).to(dtype)
            kept.dtype = dtype
    by_hand = logits(model, input_ids=token, past_key_values=clean)
    expected = logits(copy.deepcopy(model).float(), input_ids=token, past_key_values=wide)
    same(found["zero-filled cache"], by_hand, expected)


class Empty(nn.Module):
    """Keys in memory of which only a part is written, the rest masked: 0 · NaN all the same."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.project, self.make = nn.Linear(4, 4), make

    def forward(self, x: Tensor) -> Tensor:
        keys = self.make(8, 4, dtype=x.dtype)
        keys[: x.shape[1]] = self.project(x[0])
        hidden = torch.arange(8) >= x.shape[1]
        weights = (x @ keys.T).masked_fill(hidden, -torch.inf).softmax(-1)
        return weights @ keys


def test_memory_that_was_never_written_is_filled_with_zeros() -> None:
    torch.manual_seed(0)
    model, x = Empty(torch.empty).half(), torch.randn(1, 3, 4).half()
    zeros = copy.deepcopy(model)
    zeros.make = torch.zeros
    torch.use_deterministic_algorithms(True)  # fills what is empty with NaN
    try:
        found = sk.diagnose(model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        same(found["zero-filled cache"], zeros(x).float(), copy.deepcopy(zeros).float()(x.float()))


def test_a_batch_without_a_label_that_counts() -> None:
    model = llama(torch.float32)
    found = sk.diagnose(model, input_ids=IDS, labels=torch.full_like(IDS, -100))
    assert found.dtype == "float32"  # which fails as well, so that float16 is not the reason
    assert found["one label that counts"].cured
    assert "only the labels are to blame" in found.advice


def with_adapter(dtype: torch.dtype) -> Any:
    """W + sBA is 70,000 in one element of up_proj, which reads a channel that is next to nothing."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["up_proj"])
    model: Any = peft.get_peft_model(llama(torch.float32), config).eval()
    inner = model.base_model.model.model
    layer = inner.layers[0].mlp.up_proj
    for one in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        one.data.zero_()
    layer.lora_A["default"].weight.data[0, 9] = 10.0
    layer.lora_B["default"].weight.data[7, 0] = 7000.0
    inner.embed_tokens.weight.data[:, 9] = 1e-5
    inner.layers[0].self_attn.o_proj.weight.data[9] = 0
    return model.to(dtype)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_was_merged_in_float16_is_merged_in_float32() -> None:
    merged = with_adapter(torch.float32).merge_and_unload()
    expected = logits(merged, input_ids=IDS)
    found = sk.diagnose(rounded(merged), input_ids=IDS, reference=with_adapter(torch.float32))
    trial = found["merged in float32"]
    assert "70,000" in trial.summary
    merged.get_parameter(UP).data /= 2
    merged.get_parameter(DOWN).data *= 2
    same(trial, logits(rounded(merged), input_ids=IDS), expected)
    assert trial.carried


def test_nothing_of_the_kind_is_offered_where_something_overflows() -> None:
    found = sk.diagnose(residual("llama").model, input_ids=IDS)
    assert not found.finite
    others = {"weight replaced", "input replaced", "zero-filled cache", "merged in float32", "weight in float32"}
    assert not others & {one.name for one in found.trials}


def test_a_distance_leaves_no_row_out() -> None:
    """So that what is said to be compared was."""
    model = llama()
    model.get_parameter(O_PROJ).data[7, 5] = NAN
    one: Distance | None = sk.diagnose(model, input_ids=IDS)["weight replaced"].distance
    assert one is not None
    assert (one.rows, one.compared) == (IDS.numel(), IDS.numel())
