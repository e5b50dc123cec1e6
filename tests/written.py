"""A checkpoint, written in each of the formats people have: for tests that read it back."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stabilitykit.checkpoints import Checkpoint, GemmaConfig, random_checkpoint
from stabilitykit.checkpoints.vocabulary import serialised


def huggingface_config(config: GemmaConfig, *, new: bool = False) -> dict[str, Any]:
    """config.json with the keys of released checkpoints, or with those that newer transformers writes."""
    made: dict[str, Any] = {
        "model_type": config.model_type, "vocab_size": config.vocabulary, "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "max_position_embeddings": config.context, "rms_norm_eps": config.rms_eps,
        "architectures": [{1: "GemmaForCausalLM", 2: "Gemma2ForCausalLM", 3: "Gemma3ForCausalLM"}[config.generation]],
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    scaling = None if config.rope_scaling == 1 else {"rope_type": "linear", "factor": config.rope_scaling}
    if config.generation == 1:
        return made | {"rope_theta": config.rope_base}
    made |= {
        "query_pre_attn_scalar": int(config.query_scalar), "sliding_window": config.window,
        "attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.logit_softcap,
    }  # fmt: skip
    if new:
        kinds = [config.is_global(index) for index in range(config.layers)]
        made["layer_types"] = ["full_attention" if is_global else "sliding_attention" for is_global in kinds]
    if config.generation == 2:
        return made | {"rope_theta": config.rope_base}
    if new:
        made["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": config.rope_base, **(scaling or {})},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_base_local},
        }
        return made
    return made | {
        "rope_theta": config.rope_base, "rope_local_base_freq": config.rope_base_local, "rope_scaling": scaling,
        "sliding_window_pattern": config.global_every,
    }  # fmt: skip


def write_huggingface(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    prefix: str = "model.",
    new: bool = False,
) -> Path:
    """A folder with config.json, safetensors and tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(huggingface_config(checkpoint.config, new=new)))
    (folder / "tokenizer.model").write_bytes(serialised(checkpoint.vocabulary))
    tensors = {f"{prefix}{name}": tensor.to(dtype).contiguous() for name, tensor in checkpoint.tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where: dict[str, str] = {}
    for index in range(shards):
        name = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def gemma_pytorch_state(checkpoint: Checkpoint, *, int8: bool = False) -> dict[str, Tensor]:
    """The tensors under gemma_pytorch's names: q, k and v in one matrix, and its tables of rotations beside them."""
    tensors, state = checkpoint.tensors, {}
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            tensor, name = torch.cat(parts), name.replace("q_proj", "qkv_proj")
        name = name.replace("q_norm", "query_norm").replace("k_norm", "key_norm")
        name = "embedder.weight" if name == "embed_tokens.weight" else f"model.{name}"
        if int8 and tensor.ndim == 2:
            scaler = tensor.abs().amax(1) / 127
            state[f"{name}_scaler"] = scaler
            tensor = (tensor / scaler[:, None].clamp_min(1e-30)).round().to(torch.int8)
        state[name] = tensor.clone()
    half = checkpoint.config.head_dim // 2
    table = torch.polar(torch.ones(8, half), torch.arange(8.0)[:, None] * torch.ones(half))
    names = ("local_freqs_cis", "global_freqs_cis") if checkpoint.config.generation == 3 else ("freqs_cis",)
    return state | dict.fromkeys(names, table)


def write_gemma_pytorch(checkpoint: Checkpoint, folder: Path, *, int8: bool = False, shards: int = 1) -> Path:
    """A `.ckpt` file with its tokenizer.model beside it, or the folder of its shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(serialised(checkpoint.vocabulary))
    state = gemma_pytorch_state(checkpoint, int8=int8)
    if shards == 1:
        torch.save({"model_state_dict": state}, folder / "model.ckpt")
        return folder / "model.ckpt"
    where: dict[str, str] = {}
    for index in range(shards):
        name = f"pytorch_model-{index + 1:05}-of-{shards:05}.bin"
        part = dict(list(state.items())[index::shards])
        torch.save(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def write_tokenizer(folder: Path) -> None:
    """A fast tokenizer of single characters, over the 512 tokens of a random checkpoint."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = random_checkpoint("random:gemma3-270m?layers=1&vocabulary=512").vocabulary.pieces
    ids = {piece: index for index, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=ids, merges=[], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    made.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"])
    made.save(str(folder / "tokenizer.json"))
    turn = "<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    template = f"{{{{ bos_token }}}}{{% for m in messages %}}{turn}{{% endfor %}}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
                "pad_token": "<pad>", "unk_token": "<unk>", "chat_template": template,
            }
        )
    )  # fmt: skip
