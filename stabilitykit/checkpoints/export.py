"""A checkpoint -> a Hugging Face folder that plain transformers loads: config, weights, tokenizer."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stabilitykit.checkpoints.cache import Progress
from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.checkpoints.huggingface import CONFIG
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.checkpoints.vocabulary import serialised
from stabilitykit.choices import ExportDtype

_SHARD = 4_000_000_000  # bytes of weights in one file, and so about as much memory
_ARCHITECTURES = {1: "GemmaForCausalLM", 2: "Gemma2ForCausalLM", 3: "Gemma3ForCausalLM"}
# Files of a Hugging Face folder that an export copies unchanged.
_COPIED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def write_folder(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: ExportDtype,
    *,
    source: Path | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes the checkpoint into the empty `folder`, with weights rounded to `dtype`, and returns the weight files.

    Tokenizer and chat template are copied from `source`, the Hugging Face folder it was read from; without one the
    tokenizer is made from the vocabulary. `progress` is called with the bytes written and the total.
    """
    config = huggingface_config(checkpoint, dtype)
    (folder / CONFIG).write_text(folder_json(config), encoding="utf-8")
    _write_generation(config, folder, source)
    _write_tokenizer(checkpoint, folder, source)
    return _write_weights(checkpoint, folder, getattr(torch, dtype), progress)


def huggingface_config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """config.json of the text decoder, with the keys that transformers 5 writes and the ones that 4 reads."""
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    turn = vocabulary.pieces.index("<end_of_turn>") if "<end_of_turn>" in vocabulary.pieces else None
    made: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.generation]],
        "model_type": config.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.rms_eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos if turn is None else [vocabulary.eos, turn],
        "pad_token_id": vocabulary.pad,
        "rope_theta": config.rope_base,
    }
    if config.generation == 1:
        return made
    types = ["full_attention" if config.is_global(layer) else "sliding_attention" for layer in range(config.layers)]
    made |= {
        "query_pre_attn_scalar": int(config.query_scalar),
        "sliding_window": config.window,
        "layer_types": types,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    if config.generation == 2:
        return made
    linear = config.rope_scaling != 1
    scaling = {"rope_type": "linear" if linear else "default"} | ({"factor": config.rope_scaling} if linear else {})
    return made | {
        "rope_local_base_freq": config.rope_base_local,
        "rope_scaling": scaling if linear else None,
        "sliding_window_pattern": config.global_every,
        "rope_parameters": {
            "full_attention": {"rope_theta": config.rope_base, **scaling},
            "sliding_attention": {"rope_theta": config.rope_base_local, "rope_type": "default"},
        },
    }


def _write_generation(config: dict[str, Any], folder: Path, source: Path | None) -> None:
    name = "generation_config.json"
    if source is not None and (source / name).is_file():
        shutil.copyfile(source / name, folder / name)
        return
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / name).write_text(folder_json(ids | {"do_sample": True, "top_k": 64, "top_p": 0.95}), encoding="utf-8")


def _write_tokenizer(checkpoint: Checkpoint, folder: Path, source: Path | None) -> None:
    copied = [] if source is None else [source / name for name in _COPIED if (source / name).is_file()]
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    if copied:
        return
    vocabulary = checkpoint.vocabulary
    (folder / "tokenizer.model").write_bytes(serialised(vocabulary))
    named = {"bos": vocabulary.bos, "eos": vocabulary.eos, "pad": vocabulary.pad, "unk": vocabulary.unk}
    tokens = {f"{name}_token": vocabulary.pieces[index] for name, index in named.items()}
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, **tokens}
    (folder / "tokenizer_config.json").write_text(folder_json(settings), encoding="utf-8")


def _write_weights(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, progress: Progress | None) -> list[Path]:
    shapes = parameter_shapes(checkpoint.config)
    sizes = {f"model.{name}": math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    total, done = sum(sizes.values()), 0
    shards = list(_shards(sizes))
    where: dict[str, str] = {}
    paths = []
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        held: dict[str, Tensor] = {}
        for name in names:
            held[name] = checkpoint.tensors[name.removeprefix("model.")].to(dtype).contiguous()
            done += sizes[name]
            if progress is not None:
                progress(done, total)
        save_file(held, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes files that only their owner can read
        where |= dict.fromkeys(names, file)
        paths.append(folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(folder_json(index), encoding="utf-8")
    return paths


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """The names in order, in groups: as many as one file may hold, but at least one."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > _SHARD:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def folder_json(value: Any) -> str:
    """A JSON file as transformers writes those in a folder."""
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
