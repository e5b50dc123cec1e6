"""Tiny random models of many families, and where each keeps the parts in which a fault can be planted."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from stabilitykit.scaling.apply import scaled, with_settings
from stabilitykit.scaling.stress import stress
from stabilitykit.scaling.subjects import blueprint_of, continued
from stabilitykit.scaling.trace import trace

HIDDEN, INNER, VOCABULARY = 64, 128, 128

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_PER_LAYER: dict[str, Any] = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
_SLIDING: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "eager"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Paths of parts in `model.named_modules()`; in those of a layer `{}` is its number.

    `product` and `scores` are sites of operators, None where there is no such product or where it is not one of a
    single query and key; `queries` and `keys` the linear layers that make the scores without a norm between.
    `residual`: the sum that ends a layer adds what `down` returns as it is.
    """

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{}"
    norm: str = "model.layers.{}.input_layernorm"
    gate: str | None = "model.layers.{}.mlp.gate_proj"
    up: str = "model.layers.{}.mlp.up_proj"
    down: str = "model.layers.{}.mlp.down_proj"
    product: str | None = "layers.{}.mlp/mul.0"
    queries: str | None = "model.layers.{}.self_attn.q_proj"
    keys: str | None = "model.layers.{}.self_attn.k_proj"
    values: str | None = "model.layers.{}.self_attn.v_proj"
    output: str = "model.layers.{}.self_attn.o_proj"
    attention: str = "layers.{}.self_attn"
    scores: str = "layers.{}.self_attn/matmul.0"
    norm_operator: str = "mul"
    residual: bool = True
    head: str = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    model: str
    config: str
    sizes: dict[str, Any]
    parts: Parts


def _decoder(name: str, parts: Parts | None = None, config: str = "", without: str = "", **sizes: Any) -> Family:
    kept = {key: size for key, size in _SIZES.items() if key not in without.split()}
    return Family(
        model=f"{name}ForCausalLM",
        config=config or f"{name}Config",
        sizes=kept | sizes,
        parts=parts or Parts(),
    )


_POST_NORMS = Parts(norm_operator="cast", residual=False)
_EXPERT = Parts(gate=None, product=None, up="", down="model.layers.{}.mlp.experts")

DECODERS: dict[str, Family] = {
    "gemma": _decoder("Gemma", Parts(norm_operator="cast")),
    "gemma2": _decoder("Gemma2", _POST_NORMS, query_pre_attn_scalar=16, **_SLIDING),
    "gemma3": _decoder(
        "Gemma3", Parts(norm_operator="cast", residual=False, queries=None), "Gemma3TextConfig",
        query_pre_attn_scalar=16, **_SLIDING,
    ),
    "gemma3n": _decoder(
        "Gemma3n", Parts(norm_operator="cast", residual=False, queries=None), "Gemma3nTextConfig",
        num_kv_shared_layers=0, laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0],
        **_PER_LAYER, **_SLIDING | {"intermediate_size": [INNER] * 2},
    ),
    "gemma4": _decoder(
        "Gemma4", Parts(norm_operator="cast", residual=False, queries=None), "Gemma4TextConfig",
        global_head_dim=16, num_kv_shared_layers=0, **_PER_LAYER, **_SLIDING,
    ),
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral", sliding_window=None),
    "qwen2": _decoder("Qwen2", without="head_dim"),
    "qwen3": _decoder("Qwen3", Parts(queries=None)),
    "phi": _decoder(
        "Phi",
        Parts(
            gate=None, product=None, up="model.layers.{}.mlp.fc1", down="model.layers.{}.mlp.fc2",
            output="model.layers.{}.self_attn.dense",
        ),
        without="head_dim", partial_rotary_factor=0.5,
    ),
    "gpt2": Family(
        model="GPT2LMHeadModel", config="GPT2Config",
        sizes={
            "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64,
            "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
        },
        parts=Parts(
            embedding="transformer.wte", layer="transformer.h.{}", norm="transformer.h.{}.ln_1", gate=None,
            product=None, up="transformer.h.{}.mlp.c_fc", down="transformer.h.{}.mlp.c_proj", queries=None, keys=None,
            values=None, output="transformer.h.{}.attn.c_proj", attention="transformer.h.{}.attn",
            scores="transformer.h.{}.attn/matmul.0",
        ),
    ),
    "qwen3moe": _decoder(
        "Qwen3Moe", replace(_EXPERT, queries=None), moe_intermediate_size=32, num_experts=4, decoder_sparse_step=1,
            norm_topk_prob=True,
        **_EXPERTS,
    ),
    "mixtral": _decoder("Mixtral", _EXPERT, num_local_experts=4, sliding_window=None, **_EXPERTS),
}  # fmt: skip


@cache
def _first(name: str, attention: str, sizes: tuple[tuple[str, Any], ...]) -> nn.Module:
    family = DECODERS[name]
    torch.manual_seed(0)
    settings = family.sizes | {key: list(size) if isinstance(size, tuple) else size for key, size in sizes}
    config = getattr(transformers, family.config)(**settings, attn_implementation=attention)
    return _lively(getattr(transformers, family.model)(config))


def _lively(model: nn.Module) -> nn.Module:
    """Weights of a trained model's size: as they are drawn, activations would be too small to plant anything in."""
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim > 1 and 0 < float(parameter.std()) < 0.1:
            parameter.data *= 0.1 / parameter.data.std()
    return model.eval()


def decoder(name: str, *, attention: str = "eager", **sizes: Any) -> Any:
    """A new model in float32, with the same weights each time; `sizes` are settings of its config."""
    frozen = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in sizes.items()))
    return copy.deepcopy(_first(name, attention, frozen))


def under_stress(model: Any, gamma: float, ids: Tensor) -> Any:
    """What its embedding writes times γ, and all that follows, by the scale calculus: float32 keeps every bit."""
    blueprint = blueprint_of(model)
    assert blueprint is not None
    low = copy.deepcopy(model).bfloat16()
    scaling = stress(trace(low, continued({"input_ids": ids}, steps=0), blueprint), gamma)
    made = blueprint.build(with_settings(blueprint.settings, scaling.settings)).eval().requires_grad_(False)
    found = {
        name: scaled(tensor, scaling.parameters[name]) if name in scaling.parameters else tensor
        for name, tensor in model.state_dict().items()
    }
    made.load_state_dict(found)
    assert torch.equal(made(ids).logits, model(ids).logits)
    return made


@cache
def _kept(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return _lively(build())


def new(build: Callable[[], nn.Module]) -> Any:
    """What `build` makes under one seed, built once and copied."""
    return copy.deepcopy(_kept(build))


def _config(name: str, **settings: Any) -> Any:
    return getattr(transformers, name)(**settings)


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        _config(
            "T5Config", vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=16, num_heads=4, d_ff=INNER, num_layers=2,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )  # fmt: skip


def whisper() -> nn.Module:
    return transformers.WhisperForConditionalGeneration(
        _config(
            "WhisperConfig", d_model=HIDDEN, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4,
            encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, vocab_size=VOCABULARY, max_source_positions=8,
            max_target_positions=16, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, attn_implementation="eager", begin_suppress_tokens=None, suppress_tokens=None,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    return transformers.ViTModel(
        _config(
            "ViTConfig", hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=INNER,
                image_size=8,
            patch_size=4, num_channels=3, attn_implementation="eager",
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def siglip() -> nn.Module:
    return transformers.SiglipVisionModel(
        _config(
            "SiglipVisionConfig", hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=INNER, image_size=8,
            patch_size=4, num_channels=3, attn_implementation="eager",
        )
    )  # fmt: skip


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(
        _config(
            "MambaConfig", vocab_size=VOCABULARY, hidden_size=HIDDEN, state_size=8, num_hidden_layers=2, expand=2,
                time_step_rank=4,
            tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    return transformers.BertModel(
        _config(
            "BertConfig", vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=INNER, max_position_embeddings=64, attn_implementation="eager",
        ),
        add_pooling_layer=False,
    )  # fmt: skip


class Embedder(nn.Module):
    """An embedding model: mean of the hidden states over the tokens that are not padding, at unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = bert()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask[..., None].to(hidden.dtype)
        pooled = (hidden * kept).sum(1) / kept.sum(1)
        return pooled / (pooled * pooled).sum(-1, keepdim=True).sqrt()


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(nn.functional.silu(self.norm(x)))


class VAE(nn.Module):
    """A small convolutional autoencoder: mean and log variance of a latent, one draw without noise, an image back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), Block(16), nn.Conv2d(16, 8, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(4, 16, 1), Block(16), nn.Upsample(scale_factor=2.0), nn.Conv2d(16, 3, 3, padding=1)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        mean, log_variance = self.encoder(pixels).chunk(2, 1)
        latent = mean + torch.exp(0.5 * log_variance) * 0.1
        return self.decoder(latent)
