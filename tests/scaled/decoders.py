"""Language models that continue a prompt, from the released configs made small."""

import functools
from collections.abc import Mapping
from typing import Any

from architectures import TEXT, example
from torch import nn

from scaled.entry import Entry, Plant, planted
from scaled.runs import decoded, generated, ids, padded

UNSEEN = {"longer": decoded(ids(29, seed=77), 3), "padded": padded(), "generated": generated(ids(7, seed=78))}


@functools.cache
def _small(family: str) -> tuple[Any, Any]:
    """The model class and the small config of a family in the table of architectures."""
    model, _, _ = example(TEXT, family)
    return type(model), model.config


def causal(
    name: str, family: str, *plants: Plant, kind: Any = None, experts: str = "grouped_mm", **others: Any
) -> Entry:
    """An entry of a family of the table of architectures: `others` are fields of the entry, or else settings."""
    own = {field: others.pop(field) for field in Entry.__dataclass_fields__ if field in others}

    def settings() -> dict[str, Any]:
        return {**_small(family)[1].to_dict(), **others}

    def construct(given: Mapping[str, Any], attention: str) -> nn.Module:
        released, config = _small(family)
        return built(kind or released, type(config).from_dict(dict(given)), attention, experts)

    usual = {"settings": settings, "construct": construct, "plant": planted(*plants), "run": decoded(ids(12))}
    return Entry(**usual | {"name": name, "unseen": UNSEEN} | own)


def built(kind: Any, config: Any, attention: str, experts: str = "grouped_mm") -> nn.Module:
    config._attn_implementation = attention
    if hasattr(config, "num_experts") or hasattr(config, "num_local_experts"):
        config._experts_implementation = experts
    model: nn.Module = kind(config)
    return model


def down(
    layer: int = 0,
    mlp: str = "model.layers.{}.mlp",
    up: str = "up_proj",
    down: str = "down_proj",
    size: float = 70_000.0,
) -> Plant:
    """Some channels of what a feed-forward block adds to the residual stream."""
    at = f"{mlp.format(layer)}.{down}"
    return Plant(parameter=f"{at}.weight", at=at, louder=(f"{mlp.format(layer)}.{up}.weight",), size=size)


def gain(norm: str, added: float = 0.0, size: float = 70_000.0) -> Plant:
    """Some channels of a norm after a block, whose output is added to the residual stream."""
    return Plant(parameter=f"{norm}.weight", at=norm, part=(slice(1, 9),), added=added, size=size)


def product(layer: int = 1, up: str = "up_proj", part: slice = slice(1, 4)) -> Plant:
    """Some channels of gate · up, which down_proj reads."""
    mlp = f"model.layers.{layer}.mlp"
    return Plant(parameter=f"{mlp}.{up}.weight", at=f"{mlp}.down_proj", part=(part,), read=True)


def experts(block: str = "model.layers.0.mlp", module: str = "experts", parameter: str = "down_proj") -> Plant:
    """Some channels of what every expert gives."""
    at = f"{block}.{module}"
    channels = (slice(None), slice(1, 4))
    return Plant(parameter=f"{at}.{parameter}", at=at, part=channels, louder=(f"{at}.gate_up_proj",))


_POST = "model.layers.0.post_feedforward_layernorm"
_GPT = "transformer.h.0.mlp"
_NEOX = "gpt_neox.layers.0.mlp"
_SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
_ALTERNATING: dict[str, Any] = {  # the last two layers read keys and values of layers before
    "num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3,
    "intermediate_size": [64] * 6, "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
}  # fmt: skip
_MIXTURE: dict[str, Any] = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip

DECODERS = (
    causal("Llama", "Llama", down(), product()),
    causal("Llama tied", "Llama", down(), tie_word_embeddings=True),
    causal("Llama sdpa", "Llama", down(), product(), attentions=("sdpa", "eager")),
    causal("Qwen2", "Qwen2", down(), product()),
    causal("Qwen3", "Qwen3", down(), product()),
    causal("Mistral", "Mistral", down()),
    causal("Phi-3", "Phi-3", down(up="gate_up_proj"), product(up="gate_up_proj", part=slice(-3, None))),
    causal("Gemma", "Gemma", down(), product()),
    causal("Gemma 2", "Gemma 2", gain(_POST, 1.0), product(), attentions=("eager",)),
    causal("Gemma 3", "Gemma 3", gain(_POST, 1.0), product(), **_SLIDING),
    # it stores the squares of the residual stream
    causal("Gemma 3n", "Gemma 3n", gain(_POST, size=1200.0), obstacle=("it is clamped at 1e-05",), **_ALTERNATING),
    causal("Gemma 4", "Gemma 4", gain(_POST), product(), hidden_size_per_layer_input=0),
    causal("Gemma 4 with per-layer inputs", "Gemma 4", gain(_POST), product(), margin=0.0),
    causal("Gemma 4 MoE", "Gemma 4", gain(_POST), **_MIXTURE),
    # its blocks read the residual stream as it is
    causal("OLMo 2", "OLMo 2", gain("model.layers.1.post_feedforward_layernorm"), product(layer=0)),
    causal("Qwen3-MoE", "Qwen3-MoE", experts()),
    causal("Qwen3-MoE eager experts", "Qwen3-MoE", experts(), experts="eager"),
    causal("gpt-oss", "gpt-oss", experts(), attentions=("eager",)),
    causal("PhiMoE", "PhiMoE", experts()),
    causal("DeepSeek-V3", "DeepSeek-V3", down()),
    causal(
        "Mamba", "Mamba", Plant(parameter="backbone.layers.0.mixer.out_proj.weight", at="backbone.layers.0.mixer"),
        attentions=("eager",),
    ),
    causal(
        "GPT-2", "GPT-2", margin=0.0,
        plant=planted(Plant(parameter=f"{_GPT}.c_proj.weight", at=f"{_GPT}.c_proj", part=(slice(None), slice(1, 4)))),
    ),
    causal("GPT-NeoX", "GPT-NeoX", down(mlp="gpt_neox.layers.{}.mlp", up="dense_h_to_4h", down="dense_4h_to_h")),
    causal("OPT", "OPT", down(mlp="model.decoder.layers.{}", up="fc1", down="fc2"),
           obstacle=("layer_norm", "1e-05 is added to it, which no setting")),
)  # fmt: skip
