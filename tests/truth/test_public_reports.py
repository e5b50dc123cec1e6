"""Mechanisms that people reported in public, rebuilt on small models: each gets its right answer."""

import math
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from stabilitykit.diagnosis.verdict import weights_sentence
from stabilitykit.recorder.weights import check_weights
from truth.models import decoder, new, t5, whisper
from truth.others import HalfNorm, run_t5, run_whisper
from truth.plants import answer
from truth.told import COARSE, IDS, does_not_exclude, first, logits, says, says_not, silent, told

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's use of transformers
PADDED = torch.tensor([[0, 0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26, 27]])
ATTENDED = (PADDED != 0).long()
POSITIONS = (ATTENDED.cumsum(-1) - 1).clamp(min=0)


# Norms, masks and padding


def norm_in_half() -> Any:
    model = new(whisper)
    model.model.encoder.embed_positions.weight.data[3, 0] = 800
    layer = model.model.encoder.layers[1]
    layer.self_attn_layer_norm = HalfNorm(layer.self_attn_layer_norm)
    return model.half()


def test_a_norm_whose_squares_overflow_gives_finite_frames_that_are_wrong() -> None:
    said = told(norm_in_half(), run_whisper)
    found = first(said)
    assert found["site"] == "encoder.layers.1.self_attn_layer_norm/mul.0"
    assert (found["kind"], found["position"], found["outcome"], found["absorbed_by"]) == (
        "overflow", 3, "absorbed", "div",
    )  # fmt: skip
    assert found["harmless"] is not True
    says(said, "frame 3", "infinity is 0")


@pytest.mark.parametrize("level", COARSE)
def test_levels_without_operators_do_not_call_that_norm_healthy(level: str) -> None:
    does_not_exclude(told(norm_in_half(), run_whisper, level))


def padding_sees_nothing(dtype: torch.dtype) -> tuple[Any, Any]:
    causal = torch.ones(7, 7).tril().bool()[None, None] & ATTENDED[:, None, None].bool()
    mask = torch.zeros(2, 1, 7, 7).masked_fill(~causal, -math.inf).to(dtype)
    return decoder("llama").to(dtype), lambda m: m(PADDED, attention_mask=mask, position_ids=POSITIONS).logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_padding_that_sees_no_key_is_a_masked_row_of_the_padded_text_alone(dtype: torch.dtype) -> None:
    said = told(*padding_sees_nothing(dtype))
    found = first(said)
    assert (found["kind"], found["site"]) == ("masked-row", "layers.0.self_attn/softmax.0")
    assert (found["row"], found["position"]) == (0, 0)
    assert found["positions"] == [0, 1, 2]
    says(said, "mask", "row 0")
    says_not(said, "wider range", "starts with")


@pytest.mark.parametrize("level", COARSE)
def test_levels_without_operators_do_not_blame_the_input_for_a_masked_row(level: str) -> None:
    said = told(*padding_sees_nothing(torch.float16), level)
    assert first(said)["kind"] == "unresolved"
    says_not(said, "check what is passed", "starts with", "wider range")


def test_masks_that_leave_every_query_a_key_are_silent() -> None:
    model = decoder("llama", attention="sdpa").half()
    silent(told(model, lambda m: m(PADDED, attention_mask=ATTENDED, position_ids=POSITIONS)))
    silent(told(decoder("llama").half(), lambda m: m(PADDED, attention_mask=ATTENDED, position_ids=POSITIONS)))


def padding_overflows() -> Any:
    model = decoder("llama")
    embedding = model.model.embed_tokens.weight.data
    embedding[:, 0] = 0
    embedding[0] = 0
    embedding[0, 0] = 1
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    model.model.layers[0].mlp.down_proj.weight.zero_()
    mlp = model.model.layers[1].mlp
    for part, value in ((mlp.gate_proj, 32.0), (mlp.up_proj, 33.0)):
        part.weight[0] = 0
        part.weight[0, 0] = value
    return model.half()


def test_a_pad_token_that_overflows_gate_times_up_is_told_for_the_padded_row() -> None:
    def run(m: Any) -> Tensor:
        return m(PADDED, attention_mask=ATTENDED, position_ids=POSITIONS).logits

    said = told(padding_overflows(), run)
    found = first(said)
    assert (found["site"], found["kind"], found["token_id"]) == ("layers.1.mlp/mul.0", "overflow", 0)
    assert (found["row"], found["positions"]) == (0, [0, 1, 2])
    assert found["value"] == pytest.approx(256 * 264, rel=0.01)
    says(said, "up_proj", "down_proj")
    says_not(said, "scale the residual", "starts with")
    silent(told(padding_overflows(), lambda m: m(PADDED[:1, 3:])))


def test_a_text_longer_than_its_sliding_window_loses_the_first_queries() -> None:
    model = decoder("gemma3").half()

    def run(length: int) -> Any:
        causal = torch.full((length, length), -math.inf, dtype=torch.float16).triu(1)[None, None]
        sliding = causal.clone()
        sliding[..., : max(0, length - 8)] = -math.inf
        masks = {"full_attention": causal, "sliding_attention": sliding}
        return lambda m: m(torch.arange(10, 10 + length)[None], attention_mask=masks).logits

    said = told(model, run(12))
    found = first(said)
    assert (found["kind"], found["site"], found["position"]) == ("masked-row", "layers.0.self_attn/softmax.0", 0)
    assert found["positions"] == [0, 1, 2, 3]
    says_not(said, "starts with", "wider range")
    silent(told(model, run(8)))


# Weights


def test_a_merged_adapter_is_a_weight_that_overflows_and_on_top_it_is_finite() -> None:
    def build(merge: bool) -> Any:
        model = decoder("llama")
        model.model.layers[0].input_layernorm.weight.data[9] = 1e-4  # what the adapter reads is small
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["up_proj"])
        wrapped: Any = peft.get_peft_model(model, config)
        target = wrapped.base_model.model.model.layers[0].mlp.up_proj
        wrapped.base_model.model.model.layers[0].post_attention_layernorm.weight.data[9] = 1e-4
        target.lora_A["default"].weight.data.zero_()
        target.lora_B["default"].weight.data.zero_()
        target.lora_A["default"].weight.data[0, 9] = 10
        target.lora_B["default"].weight.data[7, 0] = 7000
        return (wrapped.merge_and_unload() if merge else wrapped).half().eval()

    silent(told(build(False), lambda m: m(input_ids=IDS)))
    said = told(build(True), lambda m: m(input_ids=IDS))
    found = first(said)
    assert (found["site"], found["kind"]) == ("layers.0.mlp.up_proj", "weight")
    assert found["origin"] == {"kind": "weight", "name": "layers.0.mlp.up_proj.weight", "finite": False}
    assert "no number format helps" not in said["verdict"].replace("if not, no number format helps", "")


def test_weights_that_a_format_cannot_hold_are_named_with_element_and_value() -> None:
    weights = {"up_proj.weight": torch.zeros(16, 16), "gate_proj.weight": torch.ones(8, 8), "scale": torch.ones(4)}
    weights["up_proj.weight"][7, 9] = 70000.0
    weights["gate_proj.weight"][5] = 1e-9
    stored = check_weights(weights.items(), ["float16", "bfloat16"])
    worst = stored["float16"].worst[0]
    assert (worst.name, worst.index, worst.value, worst.overflow) == ("up_proj.weight", (7, 9), 70000.0, 1)
    sentence = weights_sentence(stored["float16"])
    for word in ("up_proj.weight[7, 9]", "70,000", "gate_proj.weight"):
        assert word in sentence, sentence
    assert not stored["bfloat16"].overflow


def test_a_scale_of_a_quantised_block_that_is_not_finite_is_told_by_its_block() -> None:
    rows = torch.ones(4, 512)
    rows[1, 256:] = math.inf
    stored = check_weights(
        [("blk.0.ffn_down.weight", rows)], ["float16", "bfloat16"], blocks={"blk.0.ffn_down.weight": 256}
    )
    for dtype in ("float16", "bfloat16"):
        worst = stored[dtype].worst[0]
        assert (worst.nonfinite, worst.index, worst.block) == (256, (1, 256), 3)
        assert "blk.0.ffn_down.weight" in weights_sentence(stored[dtype])


# Products, experts and vision


def test_scores_that_overflow_before_their_scale_are_told_with_what_the_scale_would_make_of_them() -> None:
    model = decoder("phi", attention="eager")
    attention = model.model.layers[0].self_attn
    for part in (attention.q_proj, attention.k_proj):
        part.weight[:16] = 0
        part.bias[:16] = 80.0
    model.half()
    said = told(model, logits)
    found = first(said)
    assert (found["site"], found["kind"]) == ("layers.0.self_attn/matmul.0", "overflow")
    assert found["scaled"] is not None
    assert found["scaled"] == pytest.approx(found["value"] / 4, rel=0.01)
    says(said, "head 0")
    says_not(said, "scale the residual")
    for level in COARSE:
        assert first(told(model, logits, level))["kind"] == "unresolved"


def test_an_expert_that_overflows_before_its_routing_weight_is_told_with_what_it_weighs() -> None:
    from truth.experts import expert_output

    planted = expert_output("mixtral")
    assert planted.expected is not None
    said = told(planted.model, planted.run)
    found = first(said)
    assert found["site"].startswith("layers.1.mlp.experts")
    assert found["value"] == pytest.approx(planted.expected.value, rel=0.02)
    assert found["scaled"] == pytest.approx(planted.expected.scaled, rel=0.05)
    assert found["token_id"] in (None, planted.expected.token)
    says(said, "expert")


def test_a_patch_that_overflows_its_projection_is_no_token() -> None:
    from transformers.models.gemma4_unified import modeling_gemma4_unified as unified

    torch.manual_seed(0)
    vision = transformers.Gemma4UnifiedVisionConfig(patch_size=2, mm_embed_dim=32, output_proj_dims=32)
    text = transformers.Gemma4UnifiedTextConfig(hidden_size=64)
    embedder = unified.Gemma4UnifiedVisionEmbedder(vision, text).eval().requires_grad_(False)
    size = embedder.patch_dense.in_features
    board = torch.tensor([1.0 if (i // 3) % 2 else -1.0 for i in range(size)])
    for parameter in embedder.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02)
    embedder.patch_dense.weight[0] = 700 * torch.sign(embedder.patch_ln1(board))
    embedder.half()
    noise = torch.rand(1, 4, size).half() * 2 - 1
    pixels = noise.clone()
    pixels[0, 2] = board.half()
    where = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]])
    said = told(embedder, lambda m: m(pixels, where))
    found = first(said)
    assert (found["site"], found["kind"], found["channel"]) == ("patch_dense", "overflow", 0)
    assert found["position"] in (None, 2)
    says_not(said, "scale the residual", "at token")
    silent(told(embedder, lambda m: m(noise, where)))


def test_a_feed_forward_part_that_t5_clamps_is_finite_and_told() -> None:
    model = new(t5)
    path = "encoder.block.1.layer.1.DenseReluDense.wo"
    answer(model, path, run_t5, {2: 90000.0})
    model.half()
    said = told(model, run_t5)
    found = first(said)
    assert (found["site"], found["layer"], found["outcome"], found["absorbed_by"]) == (path, 1, "absorbed", "clamp")
    says(said, "clamp")
    for level in COARSE:
        assert "finite throughout. the" not in told(model, run_t5, level)["verdict"].lower() or (
            "cannot be excluded" in told(model, run_t5, level)["verdict"]
        )


class Opposed(nn.Module):
    """Two projections whose infinities meet in one sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(32, 16)
        self.one, self.other = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.embed_tokens.weight[:, 0] = 300
        self.one.weight[0, 0], self.other.weight[0, 0] = 300, -300

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        return self.one(x) + self.other(x)


def test_opposite_infinities_are_told_by_the_first_of_them() -> None:
    said = told(Opposed().half(), lambda m: m(torch.tensor([[3, 4]])))
    found = first(said)
    assert (found["site"], found["kind"], found["value"]) == ("one", "overflow", pytest.approx(90000, rel=0.01))
    says(said, "inf - inf")
