"""Tiny GGUF files, written by the gguf package as llama.cpp's converter writes real ones."""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from stabilitykit.checkpoints import GemmaConfig, parameter_shapes, random_checkpoint

_ARCHITECTURES = {1: "gemma", 2: "gemma2", 3: "gemma3"}
_TINY = {
    1: "random:gemma-2b?layers=2&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=8&vocabulary=263"
    "&query_scalar=8",
    2: "random:gemma2-2b?layers=2&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=8&vocabulary=263"
    "&query_scalar=8&window=16",
    3: "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=8&vocabulary=263"
    "&query_scalar=8&window=16",
}
_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}

Value = int | float | str | list[int] | list[float] | list[str] | list[bool]


def _metadata(config: GemmaConfig) -> dict[str, Value]:
    """The architecture's keys, as the converter writes them for this config."""
    keys: dict[str, Value] = {
        "context_length": config.context,
        "embedding_length": config.hidden_size,
        "block_count": config.layers,
        "feed_forward_length": config.feed_forward,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_eps,
    }
    if config.window is not None:
        keys["attention.sliding_window"] = config.window
    if config.generation == 2:
        assert config.attention_softcap is not None
        assert config.logit_softcap is not None
        keys |= {
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    if config.generation == 3:
        keys["rope.freq_base"] = config.rope_base
    if config.rope_scaling != 1:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling}
    prefix = _ARCHITECTURES[config.generation]
    return {"general.architecture": prefix, **{f"{prefix}.{key}": value for key, value in keys.items()}}


def _stored_name(generation: int, name: str) -> str:
    if name in ("embed_tokens.weight", "norm.weight"):
        return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
    _, layer, module = name.removesuffix(".weight").split(".", 2)
    stored = "ffn_norm" if generation == 1 and module == "post_attention_layernorm" else _MODULES[module]
    return f"blk.{layer}.{stored}.weight"


@pytest.fixture
def architecture_keys() -> Callable[[GemmaConfig], dict[str, Value]]:
    return _metadata


@pytest.fixture
def tiny() -> dict[int, str]:
    """By generation, the random checkpoint that `write_gguf` writes."""
    return _TINY


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny Gemma of a generation; `keys` and `tensors` replace, or with None remove, what it would hold.

    `noise` fills matrices with blocks of random bits, which every quantisation can be read from; `spec` is another
    random checkpoint to write.
    """

    def write(
        generation: int = 3,
        name: str = "tiny.gguf",
        keys: Mapping[str, Value | None] | None = None,
        tensors: Mapping[str, NDArray[np.float32] | None] | None = None,
        kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        spec: str | None = None,
        noise: bool = False,
    ) -> Path:
        checkpoint = random_checkpoint(spec or _TINY[generation])
        vocabulary = checkpoint.vocabulary
        types = {"normal": 1, "unknown": 2, "control": 3, "user_defined": 4, "unused": 5, "byte": 6}
        held: dict[str, Value | None] = {
            **_metadata(checkpoint.config),
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": list(vocabulary.pieces),
            "tokenizer.ggml.scores": list(vocabulary.scores),
            "tokenizer.ggml.token_type": [types[kind] for kind in vocabulary.types],
            **(keys or {}),
        }
        stored: dict[str, NDArray[np.float32] | None] = {}
        for parameter in parameter_shapes(checkpoint.config):
            own = checkpoint.tensors[parameter].numpy()
            stored[_stored_name(generation, parameter)] = own + np.float32(1) if own.ndim == 1 else own
        stored |= tensors or {}

        path = tmp_path / name
        writer = gguf.GGUFWriter(path, str(held.pop("general.architecture")))
        for key, value in held.items():
            _add(writer, key, value)
        for tensor, weight in stored.items():
            if weight is not None and weight.ndim == 2 and noise:
                shape = gguf.quant_shape_to_byte_shape(weight.shape, kind)
                blocks = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
                writer.add_tensor(tensor, blocks, raw_dtype=kind)
            elif weight is not None and weight.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
                writer.add_tensor(tensor, gguf.quantize(weight, kind), raw_dtype=kind)
            elif weight is not None:
                writer.add_tensor(tensor, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _add(writer: gguf.GGUFWriter, key: str, value: Value | None) -> None:
    match value:
        case None:
            pass
        case str():
            writer.add_string(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case _:
            writer.add_array(key, value)
