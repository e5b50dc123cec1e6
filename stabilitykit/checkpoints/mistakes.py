"""What went wrong, usually, where a checkpoint's names are not those that were expected."""

from collections.abc import Sequence

_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("weight_scaler",),
        "The weights are int8 and these are their scalers: without them every weight would be an integer up to 127. "
        "Open the .ckpt itself, which is dequantised with them",
    ),
    (
        (".absmax", ".quant_map", "quant_state", ".qweight", ".qzeros", ".SCB", ".weight_format"),
        "The weights are quantised by bitsandbytes, AWQ or GPTQ. Run them as transformers does: hf:FOLDER (extra: hf)",
    ),
    (
        ("lora_", "modules_to_save"),
        "This is an adapter. Give the model it belongs to as hf:FOLDER, and it as --adapter",
    ),
    (("qkv_proj", "embedder.", "query_norm"), "These are gemma_pytorch's names. Open them as a .ckpt file"),
    (("blk.", "token_embd"), "These are GGUF's names. Open the .gguf file itself"),
    (
        ("vision_tower", "multi_modal_projector", "siglip"),
        "The weights are those of a multimodal Gemma and the config is not",
    ),
)
_GENERATIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("q_norm", "k_norm"),
        "Only Gemma 3 normalises queries and keys: the config is of another generation than the weights",
    ),
    (
        ("pre_feedforward_layernorm",),
        "Gemma 2 and 3 have this norm and Gemma 1 has not: the config is of another generation",
    ),
)


def usual_mistake(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """A sentence, from the names alone: whose names they are, else how many layers, else which generation."""
    names = (*unexpected, *missing)
    if all(name.startswith("layers.") for name in names) and any(".input_layernorm." in name for name in names):
        return "The config is that of a size with another number of layers."
    for signs, sentence in (*_SIGNS, *_GENERATIONS):
        if any(sign in name for name in names for sign in signs):
            return f"{sentence}."
    return "Another generation or size of Gemma, or another model?"
