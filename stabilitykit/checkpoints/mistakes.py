"""The usual mistakes behind a checkpoint whose parameter names are not the expected ones."""

from collections.abc import Sequence

_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("weight_scaler",),
        "These are the scalers of int8 weights, which cannot be dequantised without them. Open the .ckpt file itself",
    ),
    (
        (".absmax", ".quant_map", "quant_state", ".qweight", ".qzeros", ".SCB", ".weight_format"),
        "The weights are quantised by bitsandbytes, AWQ or GPTQ. Run them with transformers: hf:FOLDER (extra: hf)",
    ),
    (
        ("lora_", "modules_to_save"),
        "This is an adapter. Pass its base model as hf:FOLDER and the adapter with --adapter",
    ),
    (("qkv_proj", "embedder.", "query_norm"), "These are gemma_pytorch's names. Open them as a .ckpt file"),
    (("blk.", "token_embd"), "These are GGUF's names. Open the .gguf file itself"),
    (
        ("vision_tower", "multi_modal_projector", "siglip"),
        "The weights are a multimodal Gemma's, and the config is not",
    ),
)
_GENERATIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("q_norm", "k_norm"),
        "Only Gemma 3 normalises queries and keys: config and weights are of different generations",
    ),
    (
        ("pre_feedforward_layernorm",),
        "Gemma 2 and 3 have this norm and Gemma 1 does not: config and weights are of different generations",
    ),
)


def usual_mistake(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """A sentence, from the names alone, on whose names they are, the number of layers or the generation."""
    names = (*unexpected, *missing)
    if all(name.startswith("layers.") for name in names) and any(".input_layernorm." in name for name in names):
        return "The config has another number of layers than the weights."
    for signs, sentence in (*_SIGNS, *_GENERATIONS):
        if any(sign in name for name in names for sign in signs):
            return f"{sentence}."
    return "Are the weights of another Gemma, or of another model?"
