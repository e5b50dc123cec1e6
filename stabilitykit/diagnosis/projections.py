"""What models call the projections of their layers, and the norms of queries and keys."""

from typing import Literal

Attended = Literal["query", "key", "value"]

PROJECTIONS: dict[Attended, tuple[str, ...]] = {
    "query": ("q_proj", "q_b_proj", "query", "q", "to_q", "q_lin", "query_proj"),
    "key": ("k_proj", "key", "k", "to_k", "k_lin", "key_proj"),
    "value": ("v_proj", "value", "v", "to_v", "v_lin", "value_proj"),
}
NORMS: dict[Attended, tuple[str, ...]] = {
    "query": ("q_norm", "query_norm", "q_layernorm"),
    "key": ("k_norm", "key_norm", "k_layernorm"),
    "value": ("v_norm",),
}
FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv")
"""One projection that makes queries, keys and values."""

OUTPUTS = ("o_proj", "out_proj", "dense", "o", "c_proj", "proj", "wo", "to_out.0", "out_lin")
"""What an attention ends with, which reads its values."""

DOWN = {"up_proj": "down_proj", "wi_1": "wo", "w3": "w2"}
"""Of a gated MLP, the projection that is multiplied by the gate, and the one that reads their product."""
