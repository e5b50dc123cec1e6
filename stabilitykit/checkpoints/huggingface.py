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
from stabilitykit.words import listed

CONFIG = "config.json"
VISION_NOTE = "only the text part was examined, not what reads images"

GENERATIONS: dict[str, Generation] = {"gemma": 1, "gemma2": 2, "gemma3_text": 3, "gemma3": 3}

# Keys that released config.json files leave out take the defaults of transformers' config class of that generation.
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
    """The Gemma in `folder`. Tensors are memory-mapped, in the dtype in which they are stored.

    `sha256` is that of the weight file; of several, that of their digests in order of file name. Raises
    CheckpointError for whatever is missing, damaged or of another architecture.
    """
    raw = read_config(folder)
    config, multimodal = gemma_config(raw, folder)
    files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    seen_vision = False
    for path in files:
        for name, tensor in tensors_of(path).items():
            plain = plain_name(name)
            if plain.startswith(_VISION):
                seen_vision = True
            else:
                tensors[plain] = tensor
    head = tensors.pop("lm_head.weight", None)
    embedding = tensors.get("embed_tokens.weight")
    if head is not None and embedding is not None and not equal(head, embedding):
        raise CheckpointError(
            f"{folder}: lm_head.weight differs from embed_tokens.weight, but Gemma ties its head to the embedding. "
            f"{_with_transformers(folder)}"
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
    """The text decoder's config in config.json, and whether the decoder is part of a multimodal model.

    Raises CheckpointError for another architecture and for features that the kit's own model lacks.
    """
    model_type = raw.get("model_type")
    generation = GENERATIONS.get(str(model_type))
    if generation is None:
        raise CheckpointError(
            f"{folder}: unknown model_type {model_type!r}; the kit's own model runs {listed(list(GENERATIONS))}. "
            f"{_with_transformers(folder)}"
        )
    text = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw
    given = {**_DEFAULTS[generation], **{key: value for key, value in text.items() if value is not None}}
    _refuse_unknown(generation, text, raw, folder)
    try:
        config = _sizes(generation, text, given, folder)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / CONFIG}: sizes must be numbers: {error}.") from error
    return config, text is not raw


def _whole(value: Any) -> int:
    """An integer, given as one or as its text. Raises ValueError for 32.5 and true."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"{value!r} is not an integer")
    return int(value)


def _sizes(generation: Generation, text: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> GemmaConfig:
    layers = _whole(given["num_hidden_layers"])
    window, global_every = _layer_types(generation, given, layers, folder)
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
        # an explicit null disables a soft-cap, where a missing key means the generation's default
        attention_softcap=_cap(text, given, "attn_logit_softcapping"),
        logit_softcap=_cap(text, given, "final_logit_softcapping"),
        rms_eps=float(given["rms_norm_eps"]),
    )


def weight_files(folder: Path) -> list[Path]:
    """The weight files in order of name; safetensors are preferred to torch's own format.

    Raises CheckpointError for a folder without any, and for an index that names a missing file.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            named = _read_json(index).get("weight_map")
            if not isinstance(named, dict):
                raise CheckpointError(
                    f"{index} has no weight_map, so the file of each tensor is unknown. Download it again."
                )
            files = [folder / name for name in sorted(set(map(str, named.values())))]
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise CheckpointError(
                    f"{index.name} names {len(files)} weight files, but {listed(missing, 3)} "
                    f"{'is' if len(missing) == 1 else 'are'} not in {folder}. Download the missing files."
                )
            return files
        if (folder / f"{stem}.{suffix}").is_file():
            return [folder / f"{stem}.{suffix}"]
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors, or model.safetensors.index.json and its shards. Was "
        "only the config downloaded?"
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
            f"{path} cannot be read as safetensors: {error}. It may be truncated; download it again."
        ) from error


def files_sha256(files: list[Path], cache: Path, progress: Progress | None = None) -> str:
    """The digest of one file; of several, that of their hexadecimal digests in the order given.

    `progress` is called with bytes of all files, while a file is read whose digest is not cached.
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


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError where it is missing or no JSON object."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}, so it is not a Hugging Face model.")
    return _read_json(folder / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Download it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(raw).__name__}. Download it again.")
    return raw


def plain_name(name: str) -> str:
    """A tensor's name in a folder without what stands before `layers.` and its like, such as `model.`"""
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
        "attention biases": bool(text.get("attention_bias")),
        "bidirectional attention": bool(text.get("use_bidirectional_attention")),
        "quantised weights": raw.get("quantization_config") is not None,
    }
    found = [what for what, here in odd.items() if here]
    if found:
        raise CheckpointError(
            f"{folder}: the kit's own model does not support {' or '.join(found)}. {_with_transformers(folder)}"
        )


def _layer_types(generation: Generation, given: Mapping[str, Any], layers: int, folder: Path) -> tuple[int | None, int]:
    """The window of local layers [tokens], and n where every n-th layer is global."""
    if generation == 1:
        return None, 1
    window = _whole(given["sliding_window"])
    types = given.get("layer_types")
    if types is None:
        return window, _whole(given.get("_sliding_window_pattern", given["sliding_window_pattern"]))
    if len(types) != layers:
        raise CheckpointError(
            f"{folder}: layer_types must have one entry per layer, got {len(types)} for num_hidden_layers = {layers}."
        )
    is_global = [one == "full_attention" for one in types]
    if all(is_global):
        return None, 1
    every = is_global.index(True) + 1 if any(is_global) else layers + 1
    if is_global != [(index + 1) % every == 0 for index in range(layers)]:
        raise CheckpointError(
            f"{folder}: in the kit's own model every n-th layer is global and the others slide; layer_types says "
            f"otherwise. {_with_transformers(folder)}"
        )
    return window, every


WITH_TRANSFORMERS = "Run it with transformers instead: hf:"


def _with_transformers(folder: Path) -> str:
    return f"{WITH_TRANSFORMERS}{folder}"


def _rope(given: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """RoPE bases of global and local layers and the scaling of global ones, from the old keys or the new."""
    new = given.get("rope_parameters")
    local: Mapping[str, Any] = {}
    if isinstance(new, dict):
        full = new.get("full_attention", new)
        local = new.get("sliding_attention", {})
    else:
        full = {"rope_theta": given["rope_theta"], **(given.get("rope_scaling") or {})}
    types = {str(part.get("rope_type", part.get("type", "default"))) for part in (full, local)}
    if types - {"default", "linear"} or float(local.get("factor", 1.0)) != 1.0:
        raise CheckpointError(
            f"{folder}: the kit's own model supports plain RoPE, and linear scaling in global layers; this config asks "
            f"for {', '.join(sorted(types))}. {_with_transformers(folder)}"
        )
    default = 10_000.0
    return {
        "base": float(full.get("rope_theta", given["rope_theta"])),
        "local": float(local.get("rope_theta", given.get("rope_local_base_freq", default))),
        "scaling": float(full.get("factor", 1.0)),
    }
