"""Sites in words, for decoders whose modules carry Hugging Face's names; other sites have no label.

Operators are numbered in order of execution, and both transformers' eager Gemma and the kit's own execute them
in this order.
"""

_MODULES = {
    "embed_tokens": "embedding, scaled",
    "input_layernorm": "norm before attention",
    "pre_feedforward_layernorm": "norm before MLP",
    "post_feedforward_layernorm": "norm after MLP",
    "q_proj": "query projection",
    "k_proj": "key projection",
    "v_proj": "value projection",
    "o_proj": "attention output projection",
    "q_norm": "query norm",
    "k_norm": "key norm",
    "gate_proj": "gate projection",
    "up_proj": "up projection",
    "act_fn": "gate, activated",
    "down_proj": "down projection",
    "norm": "final norm",
    "lm_head": "logits",
}

_OPERATORS = {
    "layer": {"add.0": "residual after attention"},
    "embed_tokens": {"embedding.0": "embedding"},
    "self_attn": {
        "mul.0": "query · cos",
        "mul.1": "query · sin",
        "add.0": "query, rotated",
        "mul.2": "key · cos",
        "mul.3": "key · sin",
        "add.1": "key, rotated",
        "matmul.0": "attention scores",
        "mul.4": "query or scores, scaled",
        "div.0": "attention scores ÷ soft-cap",
        "tanh.0": "tanh of the attention scores",
        "mul.5": "attention scores, soft-capped",
        "add.2": "attention scores, masked",
        "softmax.0": "attention probabilities",
        "cast.0": "attention probabilities, rounded",
        "matmul.1": "attention output, per head",
    },
    "mlp": {"gelu.0": "gate, activated", "mul.0": "gate · up"},
    "norm": {
        "pow.0": "squares",
        "mean.0": "mean square",
        "add.0": "mean square + eps",
        "rsqrt.0": "1 ÷ root mean square",
        "mul.0": "normalised",
        "add.1": "gain 1 + w",
        "mul.1": "normalised · gain",
    },
    "sampler": {
        "div.0": "logits ÷ temperature",
        "softmax.0": "probabilities",
        "cumsum.0": "cumulative probability",
        "sub.0": "probability before the token",
        "where.0": "probabilities kept",
        "sum.0": "total probability kept",
        "div.1": "probabilities, renormalised",
    },
    "": {
        "div.0": "logits ÷ soft-cap",
        "tanh.0": "tanh of the logits",
        "mul.0": "logits, soft-capped",
        "output": "model output",
    },
}


def label(site: str, *, post_norms: bool) -> str | None:
    """What is made at `site`, or None for a site nobody has named.

    `post_norms`: whether the model has norms after its sublayers, which decides what Hugging Face's
    `post_attention_layernorm` is: in Gemma 1 it is the norm before the MLP.
    """
    module, _, operator = site.partition("/")
    parent, _, name = module.rpartition(".")
    if parent.endswith("layers") and name.isdigit():
        return _OPERATORS["layer"].get(operator) if operator else "residual after MLP"
    if name == "post_attention_layernorm":
        named = "norm after attention" if post_norms else "norm before MLP"
    else:
        named = _MODULES.get(name, "")
    if not operator:
        return named or None
    if name.endswith("norm"):
        inside = _OPERATORS["norm"].get(operator)
        return f"{inside} in {named}" if inside and named else None
    return _OPERATORS.get(name, {}).get(operator)
