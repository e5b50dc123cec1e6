"""Hugging Face folders: config.json, weights in one file or in shards, and a tokenizer."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stabilitykit.checkpoints.cache import Progress, file_sha256
from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.checkpoints.config import GemmaConfig, Generation
from stabilitykit.checkpoints.mapped import equal
from stabilitykit.checkpoints.pickles import load_pickle
from stabilitykit.checkpoints.vocabulary import folder_vocabulary
from stabilitykit.errors import CheckpointError

CONFIG = "config.json"
VISION_NOTE = "only the text part was examined, not what reads images"

_GENERATIONS: dict[str, Generation] = {"gemma": 1, "gemma2": 2, "gemma3_text": 3, "gemma3": 3}

# What released config.json files leave out takes the value of transformers' config class of that generation.
_DEFAULTS: dict[Generation, dict[str, Any]] = {
    1: {
        "vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24_576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    },
    2: {
        "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    3: {
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6,
    },
}  # fmt: skip
# Longest first: one name may begin with several.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "text_model.", "model.")
_VISION = ("vision_tower.", "vision_model.", "multi_modal_projector.")


def read_huggingface(folder: Path, *, cache: Path, progress: Progress | None = None) -> Checkpoint:
    """The Gemma in `folder`. Tensors are memory-mapped in the dtype they are stored in.

    `sha256` is that of the file of weights; of several, that of their digests in the order of their names. Raises
    CheckpointError, in one sentence, for whatever is missing, damaged or of another architecture.
    """
    raw = _config(folder)
    config, multimodal = gemma_config(raw, folder)
    files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    seen_vision = False
    for path in files:
        for name, tensor in tensors_of(path).items():
            plain = _plain(name)
            if plain.startswith(_VISION):
                seen_vision = True
            else:
                tensors[plain] = tensor
    head = tensors.pop("lm_head.weight", None)
    embedding = tensors.get("embed_tokens.weight")
    if head is not None and embedding is not None and not equal(head, embedding):
        raise CheckpointError(
            f"{folder}: a Gemma's logits come from its embedding; this lm_head.weight holds other numbers. Run it as "
            "transformers does, with hf: before the folder."
        )
    rows = config.vocabulary if embedding is None else embedding.shape[0]
    notes = (VISION_NOTE,) if (multimodal and seen_vision) or "vision_config" in raw else ()
    return Checkpoint(
        source=str(folder),
        sha256=files_sha256(files, cache, progress),
        config=config,
        tensors=tensors,
        vocabulary=folder_vocabulary(folder, rows),
        notes=notes,
    )


def gemma_config(raw: Mapping[str, Any], folder: Path) -> tuple[GemmaConfig, bool]:
    """What config.json says of the text decoder, and whether it is part of a multimodal model.

    Raises CheckpointError for another architecture and for what the kit's model does not compute.
    """
    kind = raw.get("model_type")
    generation = _GENERATIONS.get(str(kind))
    if generation is None:
        raise CheckpointError(
            f"{folder}: the kit's own model is a Gemma of generation 1, 2 or 3 ({', '.join(_GENERATIONS)}); "
            f"model_type is {kind!r}. Run it as transformers does, with hf: before the folder."
        )
    text = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw
    given = {**_DEFAULTS[generation], **{key: value for key, value in text.items() if value is not None}}
    _refuse_unknown(generation, text, raw, folder)
    try:
        config = _sizes(generation, text, given, folder)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / CONFIG}: sizes are numbers; one is not: {error}.") from error
    return config, text is not raw


def _whole(value: Any) -> int:
    """A whole number, as an int or a text of one; 32.5 and true are none."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _sizes(generation: Generation, text: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> GemmaConfig:
    layers = _whole(given["num_hidden_layers"])
    window, global_every = _layer_kinds(generation, given, layers, folder)
    rope = _rope(given, folder)
    return GemmaConfig(
        generation=generation,
        layers=layers,
        hidden_size=_whole(given["hidden_size"]),
        feed_forward=_whole(given["intermediate_size"]),
        heads=_whole(given["num_attention_heads"]),
        kv_heads=_whole(given["num_key_value_heads"]),
        head_dim=_whole(given["head_dim"]),
        vocabulary=_whole(given["vocab_size"]),
        context=_whole(given["max_position_embeddings"]),
        query_scalar=float(given["head_dim"] if generation == 1 else given["query_pre_attn_scalar"]),
        window=window,
        global_every=global_every,
        rope_base=rope["base"],
        rope_base_local=rope["local"],
        rope_scaling=rope["scaling"],
        # an explicit null switches a soft-cap off, where a missing key leaves the generation's
        attention_softcap=_cap(text, given, "attn_logit_softcapping"),
        logit_softcap=_cap(text, given, "final_logit_softcapping"),
        rms_eps=float(given["rms_norm_eps"]),
    )


def weight_files(folder: Path) -> list[Path]:
    """The files of weights, safetensors before torch's own, in the order of their names.

    Raises CheckpointError for a folder without any, and for an index that names a file that is not there.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            named = _read_json(index).get("weight_map")
            if not isinstance(named, dict):
                raise CheckpointError(f"{index} says in weight_map which tensor is in which file; it has none.")
            files = [folder / name for name in sorted(set(map(str, named.values())))]
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise CheckpointError(
                    f"{index.name} names {len(files)} files of weights, and of them {', '.join(missing[:3])} "
                    f"{'is' if len(missing) == 1 else 'are'} not in {folder}. Fetch the rest."
                )
            return files
        if (folder / f"{stem}.{suffix}").is_file():
            return [folder / f"{stem}.{suffix}"]
    raise CheckpointError(
        f"A Hugging Face folder holds model.safetensors, or shards and model.safetensors.index.json; {folder} holds "
        "neither. Was only the config fetched?"
    )


def tensors_of(path: Path) -> dict[str, Tensor]:
    """A file's tensors by the names in it, memory-mapped. Raises CheckpointError for a damaged file."""
    if path.suffix != ".safetensors":
        return load_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is a whole safetensors file; this one is not: {error}. Cut short? Fetch it again."
        ) from error


def files_sha256(files: list[Path], cache: Path, progress: Progress | None = None) -> str:
    """The digest of one file; of several, that of their digests, as text, in the order given.

    `progress` is called with bytes of all of them, while a file is read whose digest is not remembered.
    """
    sizes = [path.stat().st_size for path in files]
    digests = []
    for index, path in enumerate(files):
        before = sum(sizes[:index])

        def announce(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, sum(sizes))

        digests.append(file_sha256(path, cache, announce))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"A Hugging Face folder holds a {CONFIG}; {folder} has none.")
    return _read_json(folder / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is JSON; this one cannot be read: {error}. Fetch it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is a JSON object; this one is a {type(raw).__name__}. Fetch it again.")
    return raw


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _cap(text: Mapping[str, Any], given: Mapping[str, Any], key: str) -> float | None:
    value = text[key] if key in text else given.get(key)
    return None if value is None else float(value)


def _refuse_unknown(generation: Generation, text: Mapping[str, Any], raw: Mapping[str, Any], folder: Path) -> None:
    activation = text.get("hidden_activation") or text.get("hidden_act") or "gelu_pytorch_tanh"
    # Gemma 1 was released with "gelu" in its config and means the tanh form, as gemma_pytorch computes it.
    allowed = {"gelu_pytorch_tanh"} | ({"gelu"} if generation == 1 else set())
    odd = {
        f"the activation {activation!r}": activation not in allowed,
        "biases in attention": bool(text.get("attention_bias")),
        "attention that looks ahead": bool(text.get("use_bidirectional_attention")),
        "weights quantised by another library": raw.get("quantization_config") is not None,
    }
    found = [what for what, here in odd.items() if here]
    if found:
        raise CheckpointError(
            f"{folder}: the kit's own model does not compute {' or '.join(found)}. Run it as transformers does, with "
            "hf: before the folder."
        )


def _layer_kinds(generation: Generation, given: Mapping[str, Any], layers: int, folder: Path) -> tuple[int | None, int]:
    """The window of local layers, and every how many-eth layer is global."""
    if generation == 1:
        return None, 1
    window = _whole(given["sliding_window"])
    kinds = given.get("layer_types")
    if kinds is None:
        return window, _whole(given.get("_sliding_window_pattern", given["sliding_window_pattern"]))
    if len(kinds) != layers:
        raise CheckpointError(
            f"{folder}: layer_types names each layer's kind; it names {len(kinds)}, and num_hidden_layers is {layers}."
        )
    is_global = [kind == "full_attention" for kind in kinds]
    if all(is_global):
        return None, 1
    every = is_global.index(True) + 1 if any(is_global) else layers + 1
    if is_global != [(index + 1) % every == 0 for index in range(layers)]:
        raise CheckpointError(
            f"{folder}: in the kit's own model every n-th layer is global and the others slide; layer_types says "
            "otherwise. Run it as transformers does, with hf: before the folder."
        )
    return window, every


def _rope(given: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """The bases of global and local layers' angles and the global layers' divisor, from the old keys or the new."""
    new = given.get("rope_parameters")
    local: Mapping[str, Any] = {}
    if isinstance(new, dict):
        full = new.get("full_attention", new)
        local = new.get("sliding_attention", {})
    else:
        full = {"rope_theta": given["rope_theta"], **(given.get("rope_scaling") or {})}
    kinds = {str(part.get("rope_type", part.get("type", "default"))) for part in (full, local)}
    if kinds - {"default", "linear"} or float(local.get("factor", 1.0)) != 1.0:
        raise CheckpointError(
            f"{folder}: the kit's own model rotates by plain angles, or divides those of global layers by one factor; "
            f"this config asks for {', '.join(sorted(kinds))}. Run it as transformers does, with hf: before the folder."
        )
    default = 10_000.0
    return {
        "base": float(full.get("rope_theta", given["rope_theta"])),
        "local": float(local.get("rope_theta", given.get("rope_local_base_freq", default))),
        "scaling": float(full.get("factor", 1.0)),
    }
