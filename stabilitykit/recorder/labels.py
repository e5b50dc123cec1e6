"""Sites in words, for families of decoders that are known; a site of another model has no label.

Operators are numbered in order of execution: transformers' eager models and the kit's own execute them in the order
given here, and gemma_pytorch's in one of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stabilitykit.recorder.origins import Role

_MODULES = {
    "embed_tokens": "embedding",
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
    "self_attn": {
        "mul.0": "query · cos",
        "neg.0": "query, half of it negated",
        "mul.1": "query · sin",
        "add.0": "query, rotated",
        "mul.2": "key · cos",
        "neg.1": "key, half of it negated",
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
        "scaled_dot_product_attention.0": "attention output, per head",
    },
    "mlp": {"gelu.0": "gate, activated", "silu.0": "gate, activated", "mul.0": "gate · up"},
    "norm": {
        "pow.0": "squares",
        "mean.0": "mean square",
        "add.0": "mean square + eps",
        "rsqrt.0": "1 ÷ root mean square",
        "pow.1": "1 ÷ root mean square",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the sites of one family of decoders are called, beyond what all of them share.

    `post_norms`: whether sublayers are normalised after they ran, which decides what Hugging Face's
    `post_attention_layernorm` is: elsewhere it is the norm before the MLP. `layer` names the operators executed
    directly in a decoder layer and `output` what the layer returns. `modules` and `operators` replace and add.
    """

    post_norms: bool = False
    layer: Mapping[str, str] = field(default_factory=lambda: {"add.0": "residual after attention"})
    output: str = "residual after MLP"
    modules: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


_SCALED: dict[str, Any] = {
    "modules": {"embed_tokens": "embedding, scaled"},
    "operators": {"embed_tokens": {"embedding.0": "embedding"}},
}
_PER_LAYER = {
    "embed_tokens_per_layer": "embedding for each layer, scaled",
    "per_layer_model_projection": "projection for each layer",
    "per_layer_projection_norm": "norm of the projection for each layer",
    "per_layer_input_gate": "gate of the layer's own input",
    "per_layer_projection": "layer's own input, projected",
    "post_per_layer_input_norm": "norm of the layer's own input",
    "v_norm": "value norm",
    **_SCALED["modules"],
}
# What gemma_pytorch executes in another order than transformers: one product for q, k and v, complex rotation.
_GEMMA_PYTORCH: dict[str, Any] = {
    "modules": {
        "embedder": "embedding",
        "qkv_proj": "query, key and value projection",
        "query_norm": "query norm",
        "key_norm": "key norm",
    },
    "operators": {
        "": {"mul.0": "embedding, scaled"},
        "self_attn": {
            "matmul.0": "attention scores",
            "softmax.0": "attention probabilities",
            "matmul.1": "attention output, per head",
        },
        "sampler": {"matmul.0": "logits", "softmax.0": "probabilities"},
    },
}

# By the config's `model_type`; for gemma_pytorch's classes by their config's architecture.
FAMILIES: Mapping[str, Family] = {
    "gemma": Family(**_SCALED),
    "gemma2": Family(post_norms=True, **_SCALED),
    "gemma3": Family(post_norms=True, **_SCALED),
    "gemma3_text": Family(post_norms=True, **_SCALED),
    "gemma3n": Family(
        post_norms=True,
        layer={
            "matmul.0": "AltUp, changes predicted",
            "add.0": "AltUp streams, predicted",
            "add.1": "residual after attention",
            "add.2": "residual after attention and LAuReL",
            "div.0": "residual after attention and LAuReL ÷ √2",
            "add.3": "residual after MLP",
            "sub.0": "AltUp, change by this layer",
            "add.5": "AltUp streams, corrected",
        },
        output="AltUp streams after the layer",
        modules=_PER_LAYER | {"laurel": "LAuReL output", "post_laurel_norm": "norm of LAuReL's output"},
        operators=_SCALED["operators"],
    ),
    "gemma4": Family(
        post_norms=True,
        layer={
            "add.0": "residual after attention",
            "add.1": "residual after MLP",
            "add.2": "residual after the layer's own input",
            "mul.0": "layer's own input, gated",
        },
        output="residual after the layer, scaled",
        modules=_PER_LAYER,
        operators=_SCALED["operators"],
    ),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "GEMMA_1": Family(**_GEMMA_PYTORCH),
    "GEMMA_2": Family(post_norms=True, **_GEMMA_PYTORCH),
    "GEMMA_3": Family(post_norms=True, **_GEMMA_PYTORCH),
}


def family_of(model: Any) -> Family | None:
    """The family that the model's config says it is of; None where it says nothing that is known.

    A Gemma 4 with experts executes other operators in its layers, so it counts as unknown.
    """
    config = getattr(model, "config", None)
    if getattr(getattr(config, "text_config", config), "enable_moe_block", False):
        return None
    kind = getattr(config, "model_type", None)
    if kind is None:
        kind = getattr(getattr(config, "architecture", None), "name", None)
    return FAMILIES.get(str(kind).removesuffix("_text") if str(kind) not in FAMILIES else str(kind))


# Operators are numbered in the order of a plain model. What the data flow says of a tensor decides whether the number
# still means that: a cast of a mask is none of the probabilities, a norm of somebody's own has no mean square.
_ROLES: Mapping[str, frozenset[Role | None]] = {
    "matmul.0": frozenset({"scores"}),
    "mul.4": frozenset({"query", "scores", None}),
    "div.0": frozenset({"scores"}),
    "tanh.0": frozenset({"scores"}),
    "mul.5": frozenset({"scores"}),
    "add.2": frozenset({"scores"}),
    "softmax.0": frozenset({"probabilities"}),
    "cast.0": frozenset({"probabilities"}),
    "matmul.1": frozenset({None}),
}
_NORM_ROLES: Mapping[str, Role] = {
    "pow.0": "squares",
    "mean.0": "mean square",
    "add.0": "mean square + eps",
    "rsqrt.0": "1 / root",
    "pow.1": "1 / root",
    "mul.0": "normalised",
}


def label(site: str, family: Family | None, role: Role | Literal["any"] | None = "any") -> str | None:
    """What is made at `site` in a model of this family, or None for a site nobody has named.

    `role` is what it is for, by the data flow; "any" where a plain model of the family is meant and nothing ran.
    """
    if family is None:
        return None
    module, _, operator = site.partition("/")
    parent, _, name = module.rpartition(".")
    if parent.endswith("layers") and name.isdigit():
        return family.layer.get(operator) if operator else family.output
    if name == "post_attention_layernorm":
        named = "norm after attention" if family.post_norms else "norm before MLP"
    else:
        named = family.modules.get(name) or _MODULES.get(name, "")
    if not operator:
        return named or None
    if name.endswith("norm"):
        expected = _NORM_ROLES.get(operator)
        inside = _OPERATORS["norm"].get(operator) if expected is None or role in (expected, "any") else None
        return f"{inside} in {named}" if inside and named else None
    inside = (family.operators.get(name) or _OPERATORS.get(name, {})).get(operator)
    if role == "any":
        return inside
    if name == "self_attn" and inside is not None and not _has_role(inside, operator, role):
        return None
    return None if name == "mlp" and operator == "mul.0" and role != "product" else inside


def _has_role(named: str, operator: str, role: Role | None) -> bool:
    known = _ROLES.get(operator)
    if known is not None:
        return role in known
    word = named.partition(" ")[0].rstrip(",")
    return role is None or word not in ("query", "key") or role == word
