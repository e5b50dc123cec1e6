"""Mechanisms that people reported in public, in caches, samplers, losses and training: each gets its right answer."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from truth.experts import Recurrent
from truth.models import decoder, new
from truth.plants import answer
from truth.told import COARSE, IDS, first, logits, says, says_not, silent, told, unresolved
from truth.wrapping import ALL, HalfRotary, Sanitised

SAMPLER = ("top_p = None", "temperature None", "top_k = None")


def suppressed(**how: Any) -> Any:
    def run(m: Any) -> Tensor:
        out: Tensor = m.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, pad_token_id=0, suppress_tokens=ALL, **how
        )
        return out

    return run


@pytest.mark.parametrize("how", [{}, {"eta_cutoff": 3e-4}, {"min_p": 0.1}])
def test_processors_that_leave_no_token_are_named(how: dict[str, Any]) -> None:
    said = told(decoder("llama"), suppressed(do_sample=True, **how), raises=True)
    assert first(said)["site"].startswith("outside")
    assert first(said)["outside"] == "SuppressTokensLogitsProcessor"
    says(said, "SuppressTokens", "logits are finite")
    says_not(said, *SAMPLER, "wider range")


def test_greedy_decoding_over_no_token_is_not_called_healthy() -> None:
    says(told(decoder("llama"), suppressed(do_sample=False)), "SuppressTokens", "token 0")


class Compressed(DynamicCache):
    """Puts a key of its own into one layer's cache, rounded as it is written."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if keys.shape[-2] == IDS.shape[1] + 1 and layer_idx == 1:
            fake = torch.zeros(keys.shape[-1])
            fake[2] = -2e5
            keys = keys.clone()
            keys[:, 0, 3] = fake
            self.layers[1].keys = keys
        return keys, values


def test_a_key_that_is_written_past_the_maximum_is_told_at_the_write() -> None:
    def run(m: Any) -> Tensor:
        cache = Compressed(config=m.config)
        m(IDS, past_key_values=cache)
        return m(torch.tensor([[20]]), past_key_values=cache).logits

    said = told(decoder("llama").half(), run)
    found = first(said)
    assert (found["layer"], found["step"], found["operator"]) == (1, 1, "cast")
    assert found["value"] == pytest.approx(-2e5)
    assert "probabilities" not in (found["label"] or "")
    says_not(said, "scale the residual")


def test_a_position_that_half_does_not_hold_is_told_at_its_cast() -> None:
    model = decoder("llama").half()
    model.model.rotary_emb = HalfRotary(model.model.rotary_emb)
    said = told(model, lambda m: m(IDS, position_ids=torch.arange(70000, 70006)[None]))
    found = first(said)
    assert (found["site"], found["kind"], found["operator"]) == ("rotary_emb/constant_cast.0", "overflow", "cast")
    says(said, "70,000")
    says_not(said, "record operators", "starts with")
    silent(told(model, lambda m: m(IDS, position_ids=torch.arange(4090, 4096)[None])))


@pytest.mark.parametrize("owned", [False, True])
def test_a_soft_prompt_that_training_made_nan_is_an_input_or_a_weight(owned: bool) -> None:
    prompt = torch.zeros(1, 3, 64, dtype=torch.float16)
    gradient = torch.full_like(prompt, 1e-5)
    stepped = prompt - 1e-3 * gradient / ((gradient * gradient * 0.001).sqrt() + 1e-8)
    assert not bool(stepped.isfinite().all())
    model = decoder("llama").half()
    if owned:
        model.soft_prompt = nn.Parameter(stepped, requires_grad=False)

    def run(m: Any) -> Tensor:
        vectors = m.model.embed_tokens(IDS[:, :2])
        if not owned:
            m(inputs_embeds=torch.cat((prompt, vectors), 1))
        return m(inputs_embeds=torch.cat((m.soft_prompt if owned else stepped, vectors), 1)).logits

    said = told(model, run)
    found = first(said)
    assert found["kind"] == ("weight" if owned else "input")
    assert found["origin"]["finite"] is False
    assert found["step"] == (0 if owned else 1)
    if owned:
        assert found["origin"]["name"] == "soft_prompt"
    says_not(said, "finite operands", "overflows in")


def test_labels_that_are_all_ignored_make_the_loss_nothing_by_nothing() -> None:
    def run(m: Any) -> Tensor:
        return m(IDS, labels=torch.full_like(IDS, -100)).loss.reshape(1)

    said = told(decoder("llama"), run)
    assert first(said)["kind"] == "invalid"
    says(said, "label")
    says_not(said, "bfloat16, float32", *SAMPLER)
    for level in COARSE:
        says_not(told(decoder("llama"), run, level), "bfloat16, float32", "wider range")


def soft_capped(head: bool) -> Any:
    model = decoder("gemma2", query_pre_attn_scalar=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    if head:
        answer(model, "lm_head", logits, {2: 90000.0, 4: -90000.0})
    else:
        model.model.layers[0].self_attn.q_proj.weight.data *= 300
        model.model.layers[0].self_attn.k_proj.weight.data *= 300
    return model


@pytest.mark.parametrize("head", [False, True])
def test_a_soft_cap_makes_an_overflow_harmless(head: bool) -> None:
    with torch.inference_mode():
        right = logits(soft_capped(head))
        got = logits(soft_capped(head).half())
    assert torch.allclose(got.float()[..., 1:], right[..., 1:], atol=0.5)
    assert torch.allclose(got.float()[:, (2, 4)], right[:, (2, 4)], atol=0.5)
    said = told(soft_capped(head).half(), logits)
    found = first(said)
    assert (found["kind"], found["outcome"], found["absorbed_by"], found["harmless"]) == (
        "overflow", "absorbed", "tanh", True,
    )  # fmt: skip
    says_not(said, "wider range", "logits are infinite")


def first_word() -> Any:
    """Only a text that begins with token 77 overflows: another token before it lowers the channel."""
    model = decoder("qwen3")
    embedding, lost = model.model.embed_tokens.weight, 77
    embedding[:, 0], embedding[:, 5] = 0.02, -0.05
    embedding[lost] = 0
    embedding[lost, 0] = 1
    first_layer, second = model.model.layers
    first_layer.self_attn.v_proj.weight.zero_()
    first_layer.self_attn.o_proj.weight.zero_()
    first_layer.self_attn.v_proj.weight[0, 5] = 1
    first_layer.self_attn.o_proj.weight[0, 0] = 4
    first_layer.mlp.down_proj.weight.zero_()
    second.self_attn.o_proj.weight.zero_()
    for part, value in ((second.mlp.gate_proj, 30.0), (second.mlp.up_proj, 30.0), (second.mlp.down_proj, 0.0)):
        part.weight[0] = 0
        part.weight[0, 0] = value
    second.mlp.down_proj.weight[3] = 0
    second.mlp.down_proj.weight[3, 0] = 1.4
    return model.half()


def test_a_first_token_that_overflows_is_told_by_its_id() -> None:
    said = told(first_word(), lambda m: m(torch.tensor([[77, 11, 12]])))
    found = first(said)
    assert (found["site"], found["kind"], found["position"], found["token_id"]) == (
        "layers.1.mlp.down_proj", "overflow", 0, 77,
    )  # fmt: skip
    says(said, "77")


@pytest.mark.parametrize("level", ["operators", *COARSE])
def test_a_backward_pass_that_overflows_is_told_as_one(level: str) -> None:
    model = decoder("llama").half().requires_grad_()

    def run(m: Any) -> Tensor:
        m.zero_grad()
        loss = m(IDS, labels=IDS).loss
        (loss * 2.0**24).backward()
        return loss.detach().reshape(1)

    said = told(model, run, level, grad=True)
    found = first(said)
    lost = [name for name, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    assert found["site"].startswith("backward/")
    assert found["outside"] == "backward"
    assert any(name.endswith(found["site"].removeprefix("backward/")) for name in lost)
    says(said, "backward")
    says_not(said, "temperature", "greedy", "finite throughout")


class Masked(nn.Module):
    """A mask made by a product with a large negative buffer, which half does not hold: 0 · infinity."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.lm_head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.register_buffer("big", torch.tensor([-1e30]))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        scores = x @ x.mT / 4 + (1 - attention_mask[:, None].to(x.dtype)) * self.big
        return self.lm_head(torch.softmax(scores, -1) @ x)


def test_a_buffer_that_half_makes_infinite_is_the_origin_of_zero_times_infinity() -> None:
    def run(m: Any) -> Tensor:
        return m(torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))

    silent(told(Masked(), run))
    said = told(Masked().half(), run)
    found = first(said)
    assert found["kind"] == "weight"
    assert found["origin"] == {"kind": "buffer", "name": "big", "finite": False}
    says_not(said, "check what is passed")
    for level in COARSE:
        says_not(told(Masked().half(), run, level), "check what is passed", "starts with")


def mish() -> Any:
    class Mish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed_tokens, self.up, self.down = nn.Embedding(32, 16), nn.Linear(16, 32), nn.Linear(32, 16)
            self.up.bias.data[3] = 20

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.up(self.embed_tokens(input_ids))
            return self.down(x * torch.tanh(torch.log(1 + torch.exp(x))))

    return Mish().half()


def test_an_activation_that_saturates_is_harmless() -> None:
    said = told(mish(), lambda m: m(torch.tensor([[3, 4, 5]])))
    found = first(said)
    assert (found["operator"], found["outcome"], found["absorbed_by"], found["harmless"]) == (
        "exp", "absorbed", "tanh", True,
    )  # fmt: skip


def test_a_decay_that_grows_past_float32_is_told_in_its_step_without_other_formats() -> None:
    model = new(Recurrent)
    model.embed_tokens.weight[7] = 0
    model.embed_tokens.weight[7, 0] = 1
    model.dt.weight[5, 0] = -100
    model.dt.bias[5] = 0

    def run(m: Any) -> Tensor:
        m.state = None
        m(torch.tensor([[3, 4, 5]]))
        m(torch.tensor([[7]]))
        return m(torch.tensor([[7]]))

    said = told(model, run)
    found = first(said)
    assert (found["operator"], found["kind"], found["step"]) == ("exp", "overflow", 1)
    assert found["value"] == pytest.approx(math.exp(100), rel=0.01)
    assert found["position"] in (None, 3)
    says_not(said, "bfloat16, float32", "wider range")
    for level in COARSE:
        says_not(told(model, run, level), "bfloat16, float32", "wider range")


def test_logits_that_are_sanitised_are_not_called_healthy() -> None:
    model = decoder("llama")
    answer(model, "model.layers.0.mlp.down_proj", logits, {1: 90000.0})
    model.lm_head = Sanitised(model.lm_head)
    model.half()
    said = told(model, logits)
    found = first(said)
    assert (found["site"], found["position"], found["token_id"]) == ("layers.0.mlp.down_proj", 1, 11)
    assert (found["outcome"], found["absorbed_by"]) == ("absorbed", "nan_to_num")
    says(said, "nan_to_num")
    unresolved(told(model, logits, "layers"), "layers.0")
