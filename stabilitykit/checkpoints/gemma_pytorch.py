"""gemma_pytorch's checkpoints: a `.ckpt` file or a folder of shards, in floating point or in int8 with scalers.

They hold no config. Generation and sizes follow from the tensors' names and shapes; the rest is taken from the
released model with these sizes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stabilitykit.checkpoints.cache import Progress
from stabilitykit.checkpoints.checkpoint import Checkpoint, LazyTensors
from stabilitykit.checkpoints.config import RELEASED, GemmaConfig, GemmaSizes, Generation
from stabilitykit.checkpoints.huggingface import VISION_NOTE, files_sha256, weight_files
from stabilitykit.checkpoints.pickles import load_pickle
from stabilitykit.checkpoints.vocabulary import fitted, sentencepiece_vocabulary
from stabilitykit.errors import CheckpointError
from stabilitykit.words import listed

INDEX = "pytorch_model.bin.index.json"

_EMBEDDERS = ("embedder.weight", "text_token_embedder.weight")
_TABLES = ("freqs_cis", "local_freqs_cis", "global_freqs_cis")
_VISION = ("siglip_vision_model.", "mm_soft_embedding_norm.", "mm_input_projection.")
_RENAMED = {
    "self_attn.query_norm.weight": "self_attn.q_norm.weight",
    "self_attn.key_norm.weight": "self_attn.k_norm.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FAMILIES: dict[Generation, str] = {1: "gemma-2b", 2: "gemma2-2b", 3: "gemma3-270m"}


def read_gemma_pytorch(path: Path, *, cache: Path, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint in a `.ckpt` file or in a folder of shards with their index.

    Tensors are memory-mapped; int8 ones are dequantised to float32, weight · scaler of its row, whenever they are
    requested, so that at most one is in memory. Raises CheckpointError for a checkpoint that is missing, damaged or of
    another model, and for one without a `tokenizer.model` beside it.
    """
    files = weight_files(path) if path.is_dir() else [path]
    raw: dict[str, Tensor] = {}
    for file in files:
        raw |= load_pickle(file)
    embedder = next((name for name in _EMBEDDERS if name in raw), None)
    if embedder is None:
        raise CheckpointError(
            f"{path.name} has no embedder.weight, so it is not a gemma_pytorch checkpoint; it holds "
            f"{listed(sorted(raw), 3)}. If these are Hugging Face's names, put the file into a folder with its "
            "config.json and pass the folder."
        )
    config, notes = _config(_sizes(raw, embedder, path), path)
    if any(name.startswith(_VISION) for name in raw):
        notes = (*notes, VISION_NOTE)
    if raw[embedder].dtype == torch.int8:
        notes = (*notes, "weights dequantised from int8")
    folder = path if path.is_dir() else path.parent
    made = dict(_tensors(raw, embedder, config))
    return Checkpoint(
        source=str(path),
        sha256=files_sha256(files, cache, progress),
        config=config,
        tensors=LazyTensors(made, lambda name: made[name]()),
        blocks={name: one.tensor.shape[1:].numel() for name, one in made.items() if one.scaler is not None},
        vocabulary=fitted(sentencepiece_vocabulary(_tokenizer(folder)), config.vocabulary, "tokenizer.model"),
        notes=notes,
    )


def _sizes(raw: Mapping[str, Tensor], embedder: str, path: Path) -> GemmaSizes:
    first = "model.layers.0."
    try:
        attention, feed_forward = f"{first}self_attn.", raw[f"{first}mlp.gate_proj.weight"].shape[0]
        hidden_size = raw[embedder].shape[1]
        combined, output = raw[f"{attention}qkv_proj.weight"].shape[0], raw[f"{attention}o_proj.weight"].shape[1]
    except IndexError:
        raise CheckpointError(
            f"{path.name}: the embedding and the first layer's projections must be matrices, and one is not. The "
            "file may be damaged; download it again."
        ) from None
    except KeyError as error:
        raise CheckpointError(
            f"{path.name}: the layers of a gemma_pytorch checkpoint have qkv_proj, o_proj and gate_proj, but "
            f"{error} is missing. Is it a checkpoint of another model?"
        ) from None
    norm = raw.get(f"{attention}query_norm.weight")
    table = next((raw[name] for name in _TABLES if name in raw), None)
    generation: Generation = 3 if norm is not None else 2 if f"{first}pre_feedforward_layernorm.weight" in raw else 1
    head = len(norm) if norm is not None else 2 * table.shape[-1] if table is not None else 0
    for config in RELEASED.values():
        if not head and config.generation == generation and config.heads * config.head_dim == output:
            head = config.head_dim
    if not head or output % head or combined % head or combined <= output:
        raise CheckpointError(
            f"{path.name}: the head size ({head or 'unknown'}) must divide both the {output} channels of o_proj "
            f"and the {combined} of qkv_proj. The file may be damaged; download it again."
        )
    heads = output // head
    return GemmaSizes(
        generation=generation,
        layers=1 + max(int(match[1]) for name in raw if (match := _LAYER.fullmatch(name))),
        hidden_size=hidden_size,
        feed_forward=feed_forward,
        heads=heads,
        kv_heads=(combined // head - heads) // 2,
        head_dim=head,
        vocabulary=len(raw[embedder]),
    )


def _config(sizes: GemmaSizes, path: Path) -> tuple[GemmaConfig, tuple[str, ...]]:
    """The released config of these sizes, or that of the generation's smallest with these sizes, and a note.

    Raises CheckpointError for a released model that lacks its last layers.
    """
    for released, config in RELEASED.items():
        other = {name for name, size in asdict(sizes).items() if getattr(config, name) != size} - {"vocabulary"}
        if not other:
            return replace(config, vocabulary=sizes.vocabulary), ()
        if other == {"layers"} and sizes.layers < config.layers:
            raise CheckpointError(
                f"{path.name}: the sizes are those of {released}, which has {config.layers} layers, but only "
                f"{sizes.layers} are there. Download the checkpoint again. To read a model truncated on purpose, "
                "convert it to a Hugging Face folder, whose config.json states the number of layers."
            )
    family = _FAMILIES[sizes.generation]
    config = replace(RELEASED[family], **asdict(sizes), query_scalar=float(sizes.head_dim))
    return config, (f"sizes inferred from the tensors (of no released model); windows and RoPE bases are {family}'s",)


def _tensors(raw: Mapping[str, Tensor], embedder: str, config: GemmaConfig) -> Iterator[tuple[str, "_Stored"]]:
    """Hugging Face's names, and how to make each tensor. Unknown names are passed on unchanged."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for name, tensor in raw.items():
        scaler = raw.get(f"{name}_scaler") if tensor.dtype == torch.int8 else None
        if tensor.dtype == torch.int8 and scaler is None:
            raise CheckpointError(
                f"The int8 weight {name.removeprefix('model.')} has no scaler, so it cannot be dequantised. Download "
                "the checkpoint again."
            )
        if scaler is not None and scaler.shape != tensor.shape[:1]:
            raise CheckpointError(
                f"An int8 weight must have one scaler per row; {name.removeprefix('model.')} is {list(tensor.shape)} "
                f"and its scaler {list(scaler.shape)}. Download the checkpoint again."
            )
        layer = _LAYER.fullmatch(name)
        if name in _TABLES or name.startswith(_VISION) or _is_scaler(name, raw):
            continue
        if name == embedder:
            yield "embed_tokens.weight", _Stored(tensor, scaler)
        elif layer and layer[2] == "self_attn.qkv_proj.weight":
            ends = (0, q, q + kv, q + 2 * kv)
            for part, start, end in zip("qkv", ends, ends[1:], strict=False):
                scale = None if scaler is None else scaler[start:end]
                yield f"layers.{layer[1]}.self_attn.{part}_proj.weight", _Stored(tensor[start:end], scale)
        elif layer:
            yield f"layers.{layer[1]}.{_RENAMED.get(layer[2], layer[2])}", _Stored(tensor, scaler)
        else:
            yield name.removeprefix("model."), _Stored(tensor, scaler)


def _is_scaler(name: str, raw: Mapping[str, Tensor]) -> bool:
    """Whether this is the scaler of an int8 weight that is there too; a scaler without its weight is reported."""
    weight = raw.get(name.removesuffix("_scaler"))
    return name.endswith("weight_scaler") and weight is not None and weight.dtype == torch.int8


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file, with the scaler of each row of an int8 weight; called it is dequantised."""

    tensor: Tensor
    scaler: Tensor | None

    def __call__(self) -> Tensor:
        return self.tensor if self.scaler is None else self.tensor.float() * self.scaler.float()[:, None]


def _tokenizer(folder: Path) -> Path:
    found = sorted([*folder.glob("*.model"), *folder.glob("tokenizer/*.model")])
    if not found:
        raise CheckpointError(
            f"A gemma_pytorch checkpoint needs its tokenizer.model, and there is none in {folder}. Copy it there from "
            "where the weights came from."
        )
    return found[0]
