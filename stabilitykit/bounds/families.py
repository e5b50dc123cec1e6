"""Decoders of other families, in Hugging Face folders, that the same inequalities bound: what their layers do.

Nothing of transformers is needed to bound them: config.json and the weights' files are read, and no code runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from stabilitykit.bounds.recipe import Activation, Attention, Decoder, Recipe
from stabilitykit.checkpoints.cache import Progress, cache_folder
from stabilitykit.checkpoints.huggingface import files_sha256, plain_name, read_config, tensors_of, weight_files
from stabilitykit.errors import CheckpointError
from stabilitykit.words import listed

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu"}
# Types of RoPE whose tables are of cos and sin alone; others, such as yarn and longrope, multiply them.
_ROPES = {"default", "linear", "dynamic", "llama3", "proportional"}
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_OUTSIDE = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "multi_modal_projector.", "vision_model.")


def open_decoder(folder: Path, *, progress: Progress | None = None) -> Decoder:
    """The decoder in a Hugging Face folder: Llama, Mistral, Qwen2, Qwen3, or the text part of a Gemma 4.

    Tensors are memory-mapped. Raises CheckpointError, by name, for another architecture, a setting for which there is
    no inequality, and a folder that is damaged.
    """
    raw = read_config(folder)
    text = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw
    files = weight_files(folder)
    stored = {plain_name(name): tensor for path in files for name, tensor in tensors_of(path).items()}
    tensors = {name: tensor for name, tensor in stored.items() if not name.startswith(_OUTSIDE)}
    try:
        recipe = recipe_of(text, tensors, folder)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder}: config.json does not say how large the model is: {error!r}.") from error
    if raw.get("quantization_config") is not None:
        raise CheckpointError(f"{folder}: its weights are quantised, and bounds are of weights in floating point.")
    _check(recipe, tensors, folder)
    return Decoder(
        source=str(folder),
        sha256=files_sha256(files, cache_folder(), progress),
        recipe=recipe,
        tensors=tensors,
        notes=("only the text part was examined",) if text is not raw else (),
    )


def recipe_of(text: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Recipe:
    """What the config of a text decoder and the names of its weights say that its layers do."""
    family = str(text.get("model_type"))
    if family not in _FAMILIES:
        raise CheckpointError(
            f"{folder}: no inequality is known for model_type {family!r}. Bounds exist for RMSNorm before every "
            "attention and gated MLP, in the families Gemma 1 to 3, Llama, Mistral, Qwen2, Qwen3 and the text part of "
            f"Gemma 4 (model_type gemma, gemma2, gemma3_text, {listed(list(_FAMILIES))}); not for LayerNorm, mixtures "
            "in place of an MLP, or recurrent layers. What prompts show of any model `stabilitykit check` says."
        )
    activation = str(text.get("hidden_activation") or text.get("hidden_act"))
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"{folder}: no inequality is known for the activation {activation!r}; there is one for "
            f"{listed(list(_ACTIVATIONS))}."
        )
    _check_rope(text, folder)
    tied = text.get("tie_word_embeddings", family.startswith("gemma")) or "lm_head.weight" not in tensors
    common = Recipe(
        family=family,
        hidden_size=int(text["hidden_size"]),
        vocabulary=int(text["vocab_size"]),
        attention=(),
        activation=_ACTIVATIONS[activation],
        head="embed_tokens" if tied else "lm_head",
    )
    return _FAMILIES[family](common, text, tensors)


def _check_rope(text: Mapping[str, Any], folder: Path) -> None:
    given = [text.get("rope_parameters"), text.get("rope_scaling")]
    flat = [one for one in given if isinstance(one, dict)]
    flat += [inner for one in flat for inner in one.values() if isinstance(inner, dict)]
    for one in flat:
        kind = str(one.get("rope_type", one.get("type", "default")))
        if kind not in _ROPES:
            raise CheckpointError(
                f"{folder}: no inequality is known for RoPE of the type {kind!r}, which scales its tables; there is "
                f"one for {listed(sorted(_ROPES))}."
            )


def _keys(text: Mapping[str, Any], sliding: bool) -> int:
    context, window = int(text.get("max_position_embeddings", 1 << 20)), text.get("sliding_window")
    return min(context, int(window)) if sliding and window else context


def _llama_like(
    recipe: Recipe, text: Mapping[str, Any], tensors: Mapping[str, Tensor], *, always: tuple[str, ...] = ()
) -> Recipe:
    """Llama, and what differs from it in biases and in norms of q and k. `always`: the projections with a bias."""
    heads = int(text["num_attention_heads"])
    size = int(text.get("head_dim") or (128 if recipe.family == "qwen3" else recipe.hidden_size // heads))
    biases = always or ((*_ATTENTION, "o_proj") if text.get("attention_bias") else ())
    if text.get("mlp_bias"):
        biases = (*biases, "gate_proj", "up_proj", "down_proj")
    layers = int(text["num_hidden_layers"])
    sliding = [recipe.family == "mistral"] * layers
    if text.get("layer_types"):
        sliding = [kind == "sliding_attention" for kind in text["layer_types"]]
    return replace(
        recipe,
        rounds_before_gain=True,
        biases=biases,
        attention=tuple(
            Attention(
                heads=heads,
                kv_heads=int(text.get("num_key_value_heads") or heads),
                head_dim=size,
                keys=_keys(text, sliding[layer]),
                scale=size**-0.5,
                source=layer,
                query_key_norm=recipe.family == "qwen3",
            )
            for layer in range(layers)
        ),
    )


def _gemma_4(recipe: Recipe, text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Recipe:
    """Sizes of heads differ between layers, and are read off the weights. Late layers look at an earlier one's keys."""
    layers, shared = int(text["num_hidden_layers"]), int(text.get("num_kv_shared_layers") or 0)
    kinds = text.get("layer_types") or [
        "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(layers)
    ]
    kinds = [*kinds[: layers - 1], "full_attention"]
    own = layers - shared
    attention = []
    for layer, kind in enumerate(kinds):
        source = layer if layer < own else max(index for index in range(own) if kinds[index] == kind)
        size = len(tensors[f"layers.{layer}.self_attn.q_norm.weight"])
        attention.append(
            Attention(
                heads=int(text["num_attention_heads"]),
                kv_heads=len(tensors[f"layers.{source}.self_attn.k_proj.weight"]) // size,
                head_dim=size,
                keys=_keys(text, kind == "sliding_attention"),
                scale=1.0,
                source=source,
                query_key_norm=True,
                value_norm=True,
                value="v_proj" if f"layers.{source}.self_attn.v_proj.weight" in tensors else "k_proj",
            )
        )
    cap = text.get("final_logit_softcapping")
    return replace(
        recipe,
        attention=tuple(attention),
        biases=(*_ATTENTION, "o_proj") if text.get("attention_bias") else (),
        embedding_scale=recipe.hidden_size**0.5,
        post_norms=True,
        logit_softcap=None if cap is None else float(cap),
        own_input=int(text.get("hidden_size_per_layer_input", 256) or 0),
        layer_scalar=True,
        experts=bool(text.get("enable_moe_block")),
    )


_FAMILIES: Mapping[str, Callable[[Recipe, Mapping[str, Any], Mapping[str, Tensor]], Recipe]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": partial(_llama_like, always=_ATTENTION),
    "qwen3": _llama_like,
    "gemma4_text": _gemma_4,
}


def _check(recipe: Recipe, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """That the weights of each attention and MLP are there, in the config's shapes; an MLP's width is its own."""
    hidden = recipe.hidden_size
    wanted: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (recipe.vocabulary, hidden), "norm.weight": (hidden,),
        f"{recipe.head}.weight": (recipe.vocabulary, hidden),
    }  # fmt: skip
    for layer, mine in enumerate(recipe.attention):
        prefix, inner, keys = f"layers.{layer}.", mine.heads * mine.head_dim, mine.kv_heads * mine.head_dim
        gate = tensors.get(f"{prefix}mlp.gate_proj.weight")
        wide = 1 if gate is None else len(gate)
        matrices: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (inner, hidden), "self_attn.o_proj": (hidden, inner), "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
        }  # fmt: skip
        if mine.source == layer:
            matrices |= dict.fromkeys(("self_attn.k_proj", f"self_attn.{mine.value}"), (keys, hidden))
        for name, shape in matrices.items():
            wanted[f"{prefix}{name}.weight"] = shape
            if name.rpartition(".")[2] in recipe.biases:
                wanted[f"{prefix}{name}.bias"] = shape[:1]
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if recipe.post_norms else []
        wanted |= {f"{prefix}{name}.weight": (hidden,) for name in norms}
        if mine.query_key_norm:
            norms = ["q_norm", "k_norm"] if mine.source == layer else ["q_norm"]
            wanted |= {f"{prefix}self_attn.{name}.weight": (mine.head_dim,) for name in norms}
    for name, shape in wanted.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = "missing" if name not in tensors else f"of shape {tuple(tensors[name].shape)}"
            raise CheckpointError(
                f"{folder}: {name} must be of shape {shape}, by config.json, and is {found}. Is the config another "
                "model's?"
            )
