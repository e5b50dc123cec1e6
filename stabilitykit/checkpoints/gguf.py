"""Gemma 1, 2 and 3 from a GGUF file, as llama.cpp's converter writes it."""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType, TokenType
from gguf.quants import dequantize
from numpy.typing import NDArray

from stabilitykit.checkpoints.cache import Progress, cached_tensors, file_sha256
from stabilitykit.checkpoints.checkpoint import Checkpoint, PieceType, Vocabulary
from stabilitykit.checkpoints.config import GemmaConfig, Generation
from stabilitykit.checkpoints.gguf_file import GgufFile, GgufTensor, Value, read_gguf_file
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.errors import CheckpointError
from stabilitykit.words import listed

GENERATIONS: dict[str, Generation] = {"gemma": 1, "gemma2": 2, "gemma3": 3}

TERMS = "Gemma's weights are provided under the Gemma Terms of Use, https://ai.google.dev/gemma/terms"

# Hugging Face's names -> GGUF's, `{}` being the layer.
_OUTSIDE = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# In generation 1 Hugging Face's "post attention" norm is the one before the MLP.
_LAYER_1 = {**_LAYER, "post_attention_layernorm": "ffn_norm"}

_HEAD = "output.weight"

_ROWS_AT_ONCE = 8192  # dequantised by one thread: 20 MB of a 270M's embedding

_STORED_EXACTLY = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)

_PIECE_TYPES: dict[int, PieceType] = {
    TokenType.NORMAL: "normal",
    TokenType.UNKNOWN: "unknown",
    TokenType.CONTROL: "control",
    TokenType.USER_DEFINED: "user_defined",
    TokenType.UNUSED: "unused",
    TokenType.BYTE: "byte",
}


def read_gguf(path: str | Path, *, cache: Path, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint in a GGUF file. Its tensors are dequantised once, into `cache`, and memory-mapped from there.

    GGUF stores norm gains as 1 + w in float32. Subtracting 1 in float32 and adding it again returns the same gain to
    the last bit, for every gain of at least 0.5 and every lower one that was computed as 1 + w from a float32 w.

    Raises CheckpointError for anything but a complete GGUF file of a Gemma with a tied head, MisuseError for a cache
    without enough disk. `progress` is called with bytes, and only when the cache has to be filled.
    """
    path = Path(path)
    file = read_gguf_file(path)
    config = gemma_config(file)
    shapes = parameter_shapes(config)
    names = {name: _stored_name(config, name) for name in shapes}
    _check_tensors(file, shapes, names)
    vocabulary = _vocabulary(_Metadata(file), config)
    sha256 = file_sha256(path, cache)

    def make(name: str) -> Iterator[NDArray[np.float32]]:
        tensor = file.tensors[names[name]]
        is_gain = len(tensor.shape) == 1
        for piece in _dequantised(file, names[name], tensor):
            yield piece - np.float32(1) if is_gain else piece

    return Checkpoint(
        source=str(path),
        sha256=sha256,
        config=config,
        tensors=cached_tensors(cache, sha256, shapes, make, progress),
        vocabulary=vocabulary,
        notes=(_storage(file), TERMS),
        blocks={ours: block for ours, name in names.items() if (block := file.tensors[name].block) > 1},
    )


@dataclass(frozen=True, slots=True)
class _Metadata:
    """Metadata by key, with its type checked; keys that begin with a dot are the architecture's."""

    file: GgufFile

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    def get(self, key: str) -> Value | None:
        return self.file.metadata.get(self._full(key))

    def text(self, key: str) -> str:
        value = self._needed(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._needed(key, default)
        if not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._needed(key, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(key, "a positive number")
        return float(value)

    def softcap(self, key: str, default: float | None) -> float | None:
        """A positive number; None where it is 0, the default where it is absent."""
        if self.get(key) == 0:
            return None
        return default if self.get(key) is None else self.number(key)

    def wrong(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file.path}: {self._full(key)} must be {expected}, got {self.get(key)!r:.60}. "
            "Convert the checkpoint again."
        )

    def _full(self, key: str) -> str:
        return self.architecture + key if key.startswith(".") else key

    def _needed(self, key: str, default: Value | None = None) -> Value:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(
                f"{self.file.path}: the metadata lacks {self._full(key)}. Convert the checkpoint again."
            )
        return value


def gemma_config(file: GgufFile) -> GemmaConfig:
    """The config; what the converter leaves out gets llama.cpp's defaults.

    Raises CheckpointError for another architecture and for missing or invalid metadata.
    """
    metadata = _Metadata(file)
    generation = GENERATIONS.get(metadata.architecture)
    if generation is None:
        raise CheckpointError(
            f"{metadata.file.path}: unknown architecture {metadata.architecture!r:.60}; supported are "
            f"{listed(list(GENERATIONS))}."
        )
    layers, hidden = metadata.size(".block_count"), metadata.size(".embedding_length")
    if layers > len(metadata.file.tensors):
        raise CheckpointError(
            f"{metadata.file.path}: the metadata announces {layers} layers, but the file holds only "
            f"{len(metadata.file.tensors)} tensors. Download or convert it again."
        )
    heads = metadata.size(".attention.head_count")
    head_dim = metadata.size(".attention.key_length", hidden // heads or None)
    if metadata.size(".attention.value_length", head_dim) != head_dim:
        raise metadata.wrong(".attention.value_length", f"the key length, {head_dim}")
    rope_base = metadata.number(".rope.freq_base", 10_000.0)

    # llama.cpp's rule: the 27B of each generation scales queries by hidden/heads, all others by the head size.
    largest = (generation, layers) in ((2, 46), (3, 62))
    embedding = metadata.file.tensors.get("token_embd.weight")
    fields: dict[str, Any] = {
        "generation": generation,
        "layers": layers,
        "hidden_size": hidden,
        "feed_forward": metadata.size(".feed_forward_length"),
        "heads": heads,
        "kv_heads": metadata.size(".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocabulary": embedding.shape[0] if embedding else 1,
        "context": metadata.size(".context_length"),
        "query_scalar": float(hidden // heads if largest else head_dim),
        "window": _window(metadata, generation),
        "global_every": _global_every(metadata, generation, layers),
        "rope_base": rope_base,
        "rope_base_local": metadata.number(".rope.freq_base_swa", rope_base if generation < 3 else 10_000.0),
        "rope_scaling": _rope_scaling(metadata),
        "attention_softcap": metadata.softcap(".attn_logit_softcapping", 50.0) if generation == 2 else None,
        "logit_softcap": metadata.softcap(".final_logit_softcapping", 30.0 if generation == 2 else None),
        "rms_eps": metadata.number(".attention.layer_norm_rms_epsilon"),
    }
    try:
        return GemmaConfig(**fields)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error} Download or convert the file again.") from None


def _window(metadata: _Metadata, generation: Generation) -> int | None:
    if generation == 1:
        return None
    return metadata.size(".attention.sliding_window", 4096 if generation == 2 else None)


def _global_every(metadata: _Metadata, generation: Generation, layers: int) -> int:
    """The distance between global layers, from a number or a list with one flag per layer, true where it slides."""
    key = ".attention.sliding_window_pattern"
    default = {1: 1, 2: 2, 3: 6}[generation]
    pattern = metadata.get(key)
    if generation == 1 or not isinstance(pattern, np.ndarray):
        return metadata.size(key, default)
    slides = [bool(value) for value in pattern]
    for every in range(1, layers + 2):
        if slides == [bool((layer + 1) % every) for layer in range(layers)]:
            return every
    raise metadata.wrong(key, f"a list of {layers} flags, with every n-th layer global")


def _rope_scaling(metadata: _Metadata) -> float:
    key = ".rope.scaling.type"
    if metadata.get(key) not in (None, "none", "linear"):
        raise metadata.wrong(key, "'none' or 'linear'")
    if metadata.get(key) == "none":
        return 1.0
    return metadata.number(".rope.scaling.factor", metadata.number(".rope.scale_linear", 1.0))


def _stored_name(config: GemmaConfig, name: str) -> str:
    """GGUF's name of a parameter."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, module = name.removesuffix(".weight").split(".", 2)
    table = _LAYER_1 if config.generation == 1 else _LAYER
    return f"blk.{layer}.{table[module]}.weight"


def _check_tensors(file: GgufFile, shapes: dict[str, tuple[int, ...]], names: dict[str, str]) -> None:
    stored = dict(file.tensors)
    head, embedding = stored.pop(_HEAD, None), stored.get("token_embd.weight")
    missing = [name for name in names.values() if name not in stored]
    unexpected = [name for name in stored if name not in names.values()]
    if missing or unexpected:
        parts = [f"missing: {listed(missing, 6)}"] if missing else []
        parts += [f"unexpected: {listed([f'{name!r:.60}' for name in unexpected], 6)}"] if unexpected else []
        raise CheckpointError(
            f"{file.path}: the tensors do not match the metadata; {'; '.join(parts)}. "
            "Download or convert the file again."
        )
    wrong = [
        f"{name} is {list(stored[name].shape)}, expected {list(shapes[ours])}"
        for ours, name in names.items()
        if stored[name].shape != shapes[ours]
    ]
    if wrong:
        raise CheckpointError(f"{file.path}: tensor shapes do not match the metadata: {listed(wrong, 6)}.")
    if head is not None and embedding is not None and not _equal(head, embedding):
        raise CheckpointError(
            f"{file.path}: {_HEAD} differs from token_embd.weight, but Gemma ties its head to the embedding. "
            "Models with a separate head are not supported."
        )


def _equal(one: GgufTensor, other: GgufTensor) -> bool:
    return (one.type, one.shape) == (other.type, other.shape) and np.array_equal(one.rows, other.rows)


def _vocabulary(metadata: _Metadata, config: GemmaConfig) -> Vocabulary:
    if metadata.text("tokenizer.ggml.model") != "llama":
        raise metadata.wrong("tokenizer.ggml.model", "'llama' (SentencePiece)")
    pieces = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(pieces, list) or len(pieces) != config.vocabulary:
        count = len(pieces) if isinstance(pieces, list) else 0
        raise CheckpointError(
            f"{metadata.file.path}: the vocabulary must have one piece per row of the embedding, got {count} pieces "
            f"for {config.vocabulary} rows. Download or convert the file again."
        )
    scores = _column(metadata, "tokenizer.ggml.scores", len(pieces)).astype(np.float64)
    types = _column(metadata, "tokenizer.ggml.token_type", len(pieces)).tolist()
    if not np.isfinite(scores).all():
        raise metadata.wrong("tokenizer.ggml.scores", "a list of finite numbers")
    if not set(types) <= _PIECE_TYPES.keys():
        raise metadata.wrong(
            "tokenizer.ggml.token_type", f"a list of piece types ({', '.join(map(str, _PIECE_TYPES))})"
        )
    # SentencePiece writes every space as ▁. The converter undoes that in user-defined pieces only.
    pieces = [piece.replace(" ", "▁") for piece in pieces]
    if "" in pieces or len(set(pieces)) < len(pieces):
        raise metadata.wrong("tokenizer.ggml.tokens", "a list of unique, non-empty pieces")
    special = {
        "bos": _token(metadata, "tokenizer.ggml.bos_token_id", 2, len(pieces)),
        "eos": _token(metadata, "tokenizer.ggml.eos_token_id", 1, len(pieces)),
        "pad": _token(metadata, "tokenizer.ggml.padding_token_id", 0, len(pieces)),
        "unk": _token(metadata, "tokenizer.ggml.unknown_token_id", 3, len(pieces)),
    }
    named = tuple(_PIECE_TYPES[code] for code in types)
    return Vocabulary(pieces=tuple(pieces), scores=tuple(scores.tolist()), types=named, **special)


def _column(metadata: _Metadata, key: str, length: int) -> NDArray[Any]:
    values = metadata.get(key)
    if not isinstance(values, np.ndarray) or len(values) != length:
        raise metadata.wrong(key, f"a list of {length} numbers, one per piece")
    return values


def _token(metadata: _Metadata, key: str, default: int, count: int) -> int:
    value = metadata.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or not 0 <= value < count:
        raise metadata.wrong(key, f"a token id below {count}")
    return value


def _dequantised(file: GgufFile, name: str, tensor: GgufTensor) -> Iterator[NDArray[np.float32]]:
    """The tensor as float32, a few rows at a time, in order."""

    def convert(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        with np.errstate(all="ignore"):  # per thread; an infinite scale gives infinite or NaN weights without a warning
            return dequantize(rows, tensor.type)

    pieces = np.array_split(tensor.rows, max(1, len(tensor.rows) // _ROWS_AT_ONCE))
    threads = os.cpu_count() or 1
    try:
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(pieces), threads):  # not all at once: the results would pile up in memory
                yield from pool.map(convert, pieces[start : start + threads])
    except NotImplementedError:
        raise CheckpointError(
            f"{file.path}: the gguf package cannot dequantise {name}, which is stored as {tensor.type.name}. "
            "Upgrade gguf, or use a file with another quantisation."
        ) from None


def _storage(file: GgufFile) -> str:
    """How the matrices are stored: a note that every report repeats."""
    types = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    name = ", ".join(sorted(one.name for one in types))
    if types <= set(_STORED_EXACTLY):
        return f"weights stored in {name}"
    declared = file.metadata.get("general.file_type")
    if isinstance(declared, int) and declared in set(LlamaFileType):
        name = LlamaFileType(declared).name.removeprefix("MOSTLY_")
    return f"weights dequantised from {name}"
