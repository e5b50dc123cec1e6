"""Tiny decoders whose attention makes queries, keys and values with one projection, and how each lays them out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import transformers
from torch import Tensor, nn
from truth.models import new

HIDDEN, HEADS, EACH = 64, 4, 16

Parts = tuple[Tensor, Tensor, Tensor]


def thirds(rows: Tensor) -> Parts:
    return rows[:HIDDEN], rows[HIDDEN : 2 * HIDDEN], rows[2 * HIDDEN :]


def by_head(rows: Tensor) -> Parts:
    q, k, v = rows.view(HEADS, 3, EACH, *rows.shape[1:]).unbind(1)
    return q, k, v


def two_keys(rows: Tensor) -> Parts:
    """All queries, then two heads of keys, and two of values."""
    return rows[:64], rows[64:96], rows[96:128]


def by_two_keys(rows: Tensor) -> Parts:
    """Two queries, their key and their value, and so on."""
    grouped = rows.view(2, 4, EACH, *rows.shape[1:])
    return grouped[:, :2], grouped[:, 2], grouped[:, 3]


def one_key(rows: Tensor) -> Parts:
    return rows[:64], rows[64:80], rows[80:96]


@dataclass(frozen=True)
class Fused:
    """`parts` are views of a weight's rows, or of a bias; `value` is the first channel of the first head's values."""

    build: Callable[[], nn.Module]
    path: str
    output: str
    parts: Callable[[Tensor], Parts]
    value: int


def _model(name: str, config: str, **sizes: Any) -> nn.Module:
    made = getattr(transformers, config)(
        vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=None, attn_implementation="eager", **sizes
    )
    return getattr(transformers, name)(made)


_GPT2 = {"n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 64, "tie_word_embeddings": False}
_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "tie_word_embeddings": False}
_FALCON = "transformer.h.1.self_attention"

FUSED: dict[str, Fused] = {
    "gpt2": Fused(
        partial(_model, "GPT2LMHeadModel", "GPT2Config", **_GPT2),
        "transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj", thirds, 128,
    ),
    "phi3": Fused(
        partial(_model, "Phi3ForCausalLM", "Phi3Config", num_key_value_heads=2, intermediate_size=128, **_SIZES),
        "model.layers.1.self_attn.qkv_proj", "model.layers.1.self_attn.o_proj", two_keys, 96,
    ),
    "gpt-neox": Fused(
        partial(_model, "GPTNeoXForCausalLM", "GPTNeoXConfig", intermediate_size=128, **_SIZES),
        "gpt_neox.layers.1.attention.query_key_value", "gpt_neox.layers.1.attention.dense", by_head, 32,
    ),
    "bloom": Fused(
        partial(
            _model, "BloomForCausalLM", "BloomConfig", hidden_size=HIDDEN, n_layer=2, n_head=HEADS,
            tie_word_embeddings=False,
        ),
        "transformer.h.1.self_attention.query_key_value", "transformer.h.1.self_attention.dense", by_head, 32,
    ),
    "falcon": Fused(
        partial(_model, "FalconForCausalLM", "FalconConfig", multi_query=False, bias=True, **_SIZES),
        f"{_FALCON}.query_key_value", f"{_FALCON}.dense", by_head, 32,
    ),
    "falcon, one key": Fused(
        partial(_model, "FalconForCausalLM", "FalconConfig", multi_query=True, **_SIZES),
        f"{_FALCON}.query_key_value", f"{_FALCON}.dense", one_key, 80,
    ),
    "falcon, two keys": Fused(
        partial(
            _model, "FalconForCausalLM", "FalconConfig", new_decoder_architecture=True, num_kv_heads=2, **_SIZES
        ),
        f"{_FALCON}.query_key_value", f"{_FALCON}.dense", by_two_keys, 48,
    ),
    "mpt": Fused(
        partial(
            _model, "MptForCausalLM", "MptConfig", d_model=HIDDEN, n_layers=2, n_heads=HEADS, tie_word_embeddings=False,
        ),
        "transformer.blocks.1.attn.Wqkv", "transformer.blocks.1.attn.out_proj", thirds, 128,
    ),
}  # fmt: skip


def fused(name: str) -> Any:
    return new(FUSED[name].build)
