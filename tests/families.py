"""Small models of every family, from transformers' own released configs: only the sizes are reduced."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip


def _released(kind: Any, layers: int, **sizes: Any) -> Callable[[], Any]:
    """The config class's defaults are a released checkpoint's; `layers` is enough to keep every kind of layer."""

    def make() -> Any:
        return kind(**SMALL, num_hidden_layers=layers, **sizes)

    return make


_PER_LAYER: dict[str, Any] = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8}

# model class, config, and the layers' kinds as the released model has them
FAMILIES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "gemma": (transformers.GemmaForCausalLM, _released(transformers.GemmaConfig, 2)),
    "gemma2": (transformers.Gemma2ForCausalLM, _released(transformers.Gemma2Config, 2, sliding_window=4)),
    "gemma3": (transformers.Gemma3ForCausalLM, _released(transformers.Gemma3TextConfig, 6, sliding_window=4)),
    "gemma3n": (
        transformers.Gemma3nForCausalLM,
        lambda: transformers.Gemma3nTextConfig(
            **SMALL | {"intermediate_size": [64] * 15}, **_PER_LAYER, num_hidden_layers=15, num_kv_shared_layers=5,
            laurel_rank=4, sliding_window=4,
            activation_sparsity_pattern=[0.95] * 5 + [0.0] * 10,
        ),
    ),
    "gemma4": (
        transformers.Gemma4ForCausalLM,
        _released(transformers.Gemma4TextConfig, 6, sliding_window=4, global_head_dim=32, **_PER_LAYER),
    ),
    "llama": (transformers.LlamaForCausalLM, _released(transformers.LlamaConfig, 2)),
    "mistral": (transformers.MistralForCausalLM, _released(transformers.MistralConfig, 2)),
    "qwen2": (transformers.Qwen2ForCausalLM, _released(transformers.Qwen2Config, 2)),
    "qwen3": (transformers.Qwen3ForCausalLM, _released(transformers.Qwen3Config, 2)),
}  # fmt: skip


def family_model(name: str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    """A model with random weights, the same ones each time."""
    kind, config = FAMILIES[name]
    made = config()
    made._attn_implementation = attention
    torch.manual_seed(0)
    return kind(made).eval().to(dtype).requires_grad_(False)
