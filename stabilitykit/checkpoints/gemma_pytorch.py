"""gemma_pytorch's checkpoints: a `.ckpt` file or a folder of shards, in floating point or in int8 with scalers.

There is no config inside. Generation and sizes are read off names and shapes, and the rest is that of the released
size they belong to.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stabilitykit.checkpoints.cache import Progress
from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.checkpoints.config import RELEASED, GemmaConfig, Generation
from stabilitykit.checkpoints.huggingface import VISION_NOTE, files_sha256, weight_files
from stabilitykit.checkpoints.pickles import load_pickle
from stabilitykit.checkpoints.vocabulary import fitted, sentencepiece_vocabulary
from stabilitykit.errors import CheckpointError

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

    Tensors are memory-mapped; int8 ones are dequantised to float32, weight · scaler of its row, each time they are
    asked for, so that no more than one is in memory. Raises CheckpointError for what is missing, damaged or something
    else, and for a file without a `tokenizer.model` beside it.
    """
    files = weight_files(path) if path.is_dir() else [path]
    raw: dict[str, Tensor] = {}
    for file in files:
        raw |= load_pickle(file)
    embedder = next((name for name in _EMBEDDERS if name in raw), None)
    if embedder is None:
        some = ", ".join(sorted(raw)[:3])
        raise CheckpointError(
            f"A checkpoint of gemma_pytorch has an embedder.weight; {path.name} has {some}, ... Hugging Face's names? "
            "Put the file into a folder with its config.json and give the folder."
        )
    sizes = _Sizes.of(raw, embedder, path)
    config, notes = sizes.config(path)
    if any(name.startswith(_VISION) for name in raw):
        notes = (*notes, VISION_NOTE)
    if raw[embedder].dtype == torch.int8:
        notes = (*notes, "weights dequantised from int8")
    folder = path if path.is_dir() else path.parent
    return Checkpoint(
        source=str(path),
        sha256=files_sha256(files, cache, progress),
        config=config,
        tensors=_Tensors(dict(_tensors(raw, embedder, config))),
        vocabulary=fitted(sentencepiece_vocabulary(_tokenizer(folder)), config.vocabulary, "tokenizer.model"),
        notes=notes,
    )


class _Tensors(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for."""

    def __init__(self, made: dict[str, Callable[[], Tensor]]) -> None:
        self._made = made

    def __getitem__(self, name: str) -> Tensor:
        return self._made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What the tensors' names and shapes say."""

    generation: Generation
    layers: int
    hidden_size: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, raw: Mapping[str, Tensor], embedder: str, path: Path) -> "_Sizes":
        first = "model.layers.0."
        try:
            attention, feed_forward = f"{first}self_attn.", raw[f"{first}mlp.gate_proj.weight"].shape[0]
            hidden_size = raw[embedder].shape[1]
            combined, output = raw[f"{attention}qkv_proj.weight"].shape[0], raw[f"{attention}o_proj.weight"].shape[1]
        except IndexError:
            raise CheckpointError(
                f"{path.name}: embedding and projections are matrices; one of the first layer's is not. Is the file "
                "damaged?"
            ) from None
        except KeyError as error:
            raise CheckpointError(
                f"{path.name}: a checkpoint of gemma_pytorch has layers with qkv_proj, o_proj and gate_proj; of the "
                f"first, {error} is missing. Another model?"
            ) from None
        norm = raw.get(f"{attention}query_norm.weight")
        table = next((raw[name] for name in _TABLES if name in raw), None)
        generation: Generation = (
            3 if norm is not None else 2 if f"{first}pre_feedforward_layernorm.weight" in raw else 1
        )
        head = len(norm) if norm is not None else 2 * table.shape[-1] if table is not None else 0
        for config in RELEASED.values():
            if not head and config.generation == generation and config.heads * config.head_dim == output:
                head = config.head_dim
        if not head or output % head or combined % head or combined <= output:
            raise CheckpointError(
                f"{path.name}: heads divide the {output} channels of o_proj and the {combined} of qkv_proj evenly; "
                f"with {head or 'an unknown number of'} channels a head they do not. Is the file damaged?"
            )
        heads = output // head
        return cls(
            generation=generation,
            layers=1 + max(int(match[1]) for name in raw if (match := _LAYER.fullmatch(name))),
            hidden_size=hidden_size,
            feed_forward=feed_forward,
            heads=heads,
            kv_heads=(combined // head - heads) // 2,
            head_dim=head,
            vocabulary=len(raw[embedder]),
        )

    def config(self, path: Path) -> tuple[GemmaConfig, tuple[str, ...]]:
        """The released config of these sizes, or that of the generation's smallest with these sizes, and a note.

        Raises CheckpointError for a released size that lacks its last layers.
        """
        sizes = {name: getattr(self, name) for name in self.__slots__}
        for released, config in RELEASED.items():
            other = {name for name, size in sizes.items() if getattr(config, name) != size} - {"vocabulary"}
            if not other:
                return replace(config, vocabulary=self.vocabulary), ()
            if other == {"layers"} and self.layers < config.layers:
                raise CheckpointError(
                    f"{path.name}: every size is {released}'s, which has {config.layers} layers; here they end "
                    f"after {self.layers}. Fetch the checkpoint again. A model that was cut on purpose is read as a "
                    "Hugging Face folder, whose config.json says how many layers it has."
                )
        family = _FAMILIES[self.generation]
        known = replace(RELEASED[family], **sizes, query_scalar=float(self.head_dim))
        return known, (
            f"sizes read off the tensors, which are no released ones; windows and bases are those of {family}",
        )


def _tensors(
    raw: Mapping[str, Tensor], embedder: str, config: GemmaConfig
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Hugging Face's names, and how to make each tensor. Names that mean nothing here are passed on as they are."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for name, tensor in raw.items():
        scaler = raw.get(f"{name}_scaler") if tensor.dtype == torch.int8 else None
        if tensor.dtype == torch.int8 and scaler is None:
            raise CheckpointError(
                f"int8 weights come with scalers; {name.removeprefix('model.')} has none. Without it every weight "
                "would be an integer up to 127: fetch the checkpoint again."
            )
        if scaler is not None and scaler.shape != tensor.shape[:1]:
            raise CheckpointError(
                f"An int8 weight has a scaler for each row; {name.removeprefix('model.')} is {list(tensor.shape)} and "
                f"its scaler {list(scaler.shape)}. Fetch the checkpoint again."
            )
        layer = _LAYER.fullmatch(name)
        if name in _TABLES or name.startswith(_VISION) or _is_scaler(name, raw):
            continue
        if name == embedder:
            yield "embed_tokens.weight", _whole(tensor, scaler)
        elif layer and layer[2] == "self_attn.qkv_proj.weight":
            ends = (0, q, q + kv, q + 2 * kv)
            for part, start, end in zip("qkv", ends, ends[1:], strict=False):
                scale = None if scaler is None else scaler[start:end]
                yield f"layers.{layer[1]}.self_attn.{part}_proj.weight", _whole(tensor[start:end], scale)
        elif layer:
            yield f"layers.{layer[1]}.{_RENAMED.get(layer[2], layer[2])}", _whole(tensor, scaler)
        else:
            yield name.removeprefix("model."), _whole(tensor, scaler)


def _is_scaler(name: str, raw: Mapping[str, Tensor]) -> bool:
    """Whether this is the scaler of an int8 weight that is there too; one without its weight is a mistake to show."""
    weight = raw.get(name.removesuffix("_scaler"))
    return name.endswith("weight_scaler") and weight is not None and weight.dtype == torch.int8


def _whole(tensor: Tensor, scaler: Tensor | None) -> Callable[[], Tensor]:
    return lambda: tensor if scaler is None else tensor.float() * scaler.float()[:, None]


def _tokenizer(folder: Path) -> Path:
    found = sorted([*folder.glob("*.model"), *folder.glob("tokenizer/*.model")])
    if not found:
        raise CheckpointError(
            f"A checkpoint of gemma_pytorch comes with a tokenizer.model; beside it in {folder} there is none. Copy it "
            "there from where the weights came from."
        )
    return found[0]
