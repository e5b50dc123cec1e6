"""transformers' Gemma holding the weights of ours: the independent reference of several tests."""

import transformers

from stabilitykit.models.gemma import Gemma


def reference_model(model: Gemma) -> transformers.PreTrainedModel:
    """transformers' eager model of the same config, sharing the weights."""
    config = model.config
    theirs = {
        "vocab_size": config.vocabulary, "hidden_size": config.hidden_size, "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.rms_eps,
        "max_position_embeddings": config.context, "attn_implementation": "eager", "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    }  # fmt: skip
    if config.generation >= 2:
        kinds = [config.is_global(index) for index in range(config.layers)]
        theirs |= {
            "query_pre_attn_scalar": int(config.query_scalar),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
            "sliding_window": config.window,
            "layer_types": ["full_attention" if is_global else "sliding_attention" for is_global in kinds],
        }
    if config.generation == 3:
        scaling = {"rope_type": "linear", "factor": config.rope_scaling} if config.rope_scaling != 1 else {}
        theirs["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": config.rope_base, **scaling},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_base_local},
        }
    kind, kind_of_config = {
        1: (transformers.GemmaForCausalLM, transformers.GemmaConfig),
        2: (transformers.Gemma2ForCausalLM, transformers.Gemma2Config),
        3: (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig),
    }[config.generation]
    reference = kind(kind_of_config(**theirs)).eval()
    for name, weight in model.named_parameters():
        module = reference.model.get_submodule(name.removesuffix(".weight"))
        assert module.weight.shape == weight.shape, name
        module.weight = weight
    reference.lm_head.weight = reference.model.embed_tokens.weight
    assert {id(weight) for weight in reference.parameters()} == {id(weight) for weight in model.parameters()}
    return reference
