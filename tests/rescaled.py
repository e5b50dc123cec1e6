"""Scalings that are known to leave a model's function as it is, written by hand: for tests that apply one."""

from typing import Any

from stabilitykit.records.scaling import Factor, Scaling


def exact_scaling(model: Any) -> Scaling:
    """Of a Llama, Mistral, Qwen2 or Mixtral: the residual stream ÷ 8, and in every layer q against k, each head of v
    against the columns of o that read it, and some rows of up against the columns of down.
    """
    config = model.config
    parameters = {"model.embed_tokens.weight": Factor(exponents=(-3,))}
    if config.tie_word_embeddings:
        parameters["model.norm.weight"] = Factor(exponents=(3,))
    size, cut = config.head_dim, config.intermediate_size // 3
    group = config.num_attention_heads // config.num_key_value_heads
    heads = [(-1) ** head * (head + 1) for head in range(config.num_key_value_heads)]
    value = Factor(exponents=tuple(heads), ends={0: tuple(size * (i + 1) for i in range(len(heads)))})
    output = Factor(
        exponents=tuple(-3 - exponent for exponent in heads),
        ends={1: tuple(size * group * (i + 1) for i in range(len(heads)))},
    )
    named = {name for name, _ in model.named_parameters()}
    for layer in range(config.num_hidden_layers):
        own = {
            "self_attn.q_proj.weight": Factor(exponents=(1,)), "self_attn.q_proj.bias": Factor(exponents=(1,)),
            "self_attn.k_proj.weight": Factor(exponents=(-1,)), "self_attn.k_proj.bias": Factor(exponents=(-1,)),
            "self_attn.v_proj.weight": value, "self_attn.v_proj.bias": value, "self_attn.o_proj.weight": output,
            "mlp.up_proj.weight": Factor(exponents=(2, -4), ends={0: (cut, config.intermediate_size)}),
            "mlp.down_proj.weight": Factor(exponents=(-5, 1), ends={1: (cut, config.intermediate_size)}),
        }  # fmt: skip
        own |= _experts(config)
        whole = {f"model.layers.{layer}.{name}": factor for name, factor in own.items()}
        parameters |= {name: factor for name, factor in whole.items() if name in named}
    return Scaling(parameters=parameters, settings={"rms_norm_eps": -6})


def _experts(config: Any) -> dict[str, Factor]:
    """Each expert of its own: up, which stands below gate in one parameter, against down."""
    count, width = getattr(config, "num_local_experts", 0), config.intermediate_size
    each = tuple(range(1, count + 1))
    return {
        "mlp.experts.gate_up_proj": Factor(
            exponents=tuple(e for expert in each for e in (0, expert)), ends={0: each, 1: (width, 2 * width)}
        ),
        "mlp.experts.down_proj": Factor(exponents=tuple(-3 - expert for expert in each), ends={0: each}),
    }
