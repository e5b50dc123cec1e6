"""The parameters of a Gemma: its config determines their names and shapes."""

from stabilitykit.checkpoints.config import GemmaConfig


def parameter_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by Hugging Face's name without the leading `model.`, in order of execution.

    Linear weights are (out, in), norm gains (channels,). The head is tied to `embed_tokens.weight`, so it has
    none. `post_attention_layernorm` is the norm before the MLP in generation 1 and a norm of the attention's
    output in 2 and 3.
    """
    hidden, inner = config.hidden_size, config.feed_forward
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,)}
    layer |= {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
    }
    if config.query_key_norm:
        layer |= {"self_attn.q_norm": (config.head_dim,), "self_attn.k_norm": (config.head_dim,)}
    layer |= {"self_attn.o_proj": (hidden, queries), "post_attention_layernorm": (hidden,)}
    if config.post_norms:
        layer["pre_feedforward_layernorm"] = (hidden,)
    layer |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    if config.post_norms:
        layer["post_feedforward_layernorm"] = (hidden,)

    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocabulary, hidden)}
    for index in range(config.layers):
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (hidden,)
    return shapes
