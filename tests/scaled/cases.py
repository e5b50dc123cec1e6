"""Models in which something other than the residual stream overflows, planted number by number."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedVisionEmbedder

from scaled.decoders import causal
from scaled.entry import Entry, Run
from scaled.runs import PAD, decoded, ids, noise, padded

ROOT = 32**0.5  # what a norm makes of the one channel of 32 that is not zero
TOKEN = 77


def _alone(model: Any, token: int, channel: int, *silent: nn.Parameter) -> None:
    """Only `token` has anything in `channel`, and nothing else; the `silent` parameters add nothing to it."""
    rows = model.model.embed_tokens.weight
    rows[:, channel] = 0.0
    rows[token] = 0.0
    rows[token, channel] = 1.0
    for parameter in silent:
        parameter.zero_()


def _pad_token(model: Any, run: Run) -> None:
    """gate · up of the pad token is 46 √32 · 47 √32 = 69,184; that of no other token reaches 65,504."""
    first, second, _ = model.model.layers
    _alone(model, PAD, 0, first.self_attn.o_proj.weight, first.mlp.down_proj.weight, second.self_attn.o_proj.weight)
    second.post_attention_layernorm.weight[0] = 1.0
    second.mlp.gate_proj.weight[0, 0], second.mlp.up_proj.weight[0, 0] = 46.0, 47.0


def _with(token: int) -> Run:
    prompt = ids(12)
    prompt[:, 4] = token
    return decoded(prompt)


def _expert(model: Any, run: Run) -> None:
    """Expert 3 gives 100,000 in a channel, and its routing weight is 0.2."""
    first, second = model.model.layers
    _alone(model, TOKEN, 5, first.self_attn.o_proj.weight, first.mlp.experts.down_proj, second.self_attn.o_proj.weight)
    second.post_attention_layernorm.weight[5] = 1.0
    router, experts = second.mlp.gate.weight, second.mlp.experts
    router.zero_()
    router[3, 5], router[1, 5] = 1.0, 1.0 + 1.386 / ROOT
    router[0, 5] = router[2, 5] = -2.0
    inner = experts.gate_up_proj.shape[1] // 2
    experts.gate_up_proj[3, 0, 5], experts.gate_up_proj[3, inner, 5] = 8.0, 4.0
    experts.down_proj[3, 0, 0] = 100_000 / (8.0 * 4.0 * ROOT**2)
    for parameter in (router, experts.down_proj):
        parameter.copy_(parameter.bfloat16())


def _scores(at: slice, size: float, model: Any, run: Run) -> None:
    """q · k is about `size` squared times the channels of a head that `at` says, before it is scaled."""
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        projection.bias.unflatten(0, (-1, 8))[:, at] = size


def _board() -> torch.Tensor:
    return torch.tensor([1.0 if pixel // 3 % 2 else -1.0 for pixel in range(108)])


def _patches(seed: int) -> Run:
    """An image of four patches, the third a checkerboard."""

    def run(model: Any) -> tuple[torch.Tensor, ...]:
        pixels = noise(1, 4, 108, seed=seed)
        pixels[0, 2] = _board()
        where = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]])
        return (model(pixels.to(model.patch_dense.weight.dtype), where).pooler_output,)

    return run


def _checkerboard(model: Any, run: Run) -> None:
    """One row of the patch projection has the sign of the checkerboard: 108 · 700 = 75,600."""
    model.patch_ln1.weight.fill_(1.0)
    model.patch_ln1.bias.zero_()
    model.patch_dense.weight[0] = 700 * _board()


def _embedder() -> Entry:
    def settings() -> dict[str, Any]:
        vision = transformers.Gemma4UnifiedVisionConfig(patch_size=2, mm_embed_dim=32, output_proj_dims=32)
        text = transformers.Gemma4UnifiedTextConfig(hidden_size=64)
        return {"vision_config": vision.to_dict(), "text_config": text.to_dict()}

    def construct(given: Mapping[str, Any], attention: str) -> nn.Module:
        vision = transformers.Gemma4UnifiedVisionConfig.from_dict(given["vision_config"])
        text = transformers.Gemma4UnifiedTextConfig.from_dict(given["text_config"])
        model: nn.Module = Gemma4UnifiedVisionEmbedder(vision, text)
        return model

    return Entry(
        name="patches before a LayerNorm",
        settings=settings,
        construct=construct,
        plant=_checkerboard,
        run=_patches(1),
        unseen={"another image": _patches(2)},
        attentions=("none",),
        obstacle=("patch_ln2", "1e-05 is added to it, which no setting"),
    )


CASES = (
    causal("pad token", "Llama", plant=_pad_token, run=padded(9, 6), num_hidden_layers=3),
    causal("expert before its weight", "Mixtral", plant=_expert, experts="eager", run=_with(TOKEN)),
    causal("scores before a constant", "Phi", plant=functools.partial(_scores, slice(4, None), 140.0),
           attentions=("eager",), obstacle=("softmax is not homogeneous",)),
    causal("scores before a setting", "Granite", plant=functools.partial(_scores, slice(None), 100.0),
           attentions=("eager",), attention_bias=True, attention_multiplier=2.0**-7),
    _embedder(),
)  # fmt: skip
