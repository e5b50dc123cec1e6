"""A vocabulary from the two files in which tokenizers are stored."""

import json
import re
from pathlib import Path
from typing import Any

from stabilitykit.checkpoints.checkpoint import PieceType, Vocabulary
from stabilitykit.errors import CheckpointError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPARE = 128  # embeddings are padded to a round number of rows: by 64 in Gemma 3


def folder_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The vocabulary of `tokenizer.model` or else `tokenizer.json` in `folder`, for an embedding of `rows` rows.

    Rows beyond the last piece get unused pieces. Raises CheckpointError for a folder with neither file, a file that is
    not a Gemma's, and a vocabulary that does not fit the embedding.
    """
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file():
        found, name = sentencepiece_vocabulary(model), model.name
    elif fast.is_file():
        found, name = json_vocabulary(fast), fast.name
    else:
        raise CheckpointError(
            f"{folder} has neither tokenizer.model nor tokenizer.json. Copy it there from where the weights came from."
        )
    return fitted(found, rows, name)


def fitted(vocabulary: Vocabulary, rows: int, name: str) -> Vocabulary:
    """`vocabulary` with one piece for each of the embedding's `rows`. Raises CheckpointError where it does not fit."""
    pieces = len(vocabulary.pieces)
    if not pieces <= rows <= pieces + _SPARE:
        raise CheckpointError(
            f"A vocabulary must have one piece per row of the embedding; {name} has {pieces:,} pieces and the "
            f"embedding {rows:,} rows. Is it the tokenizer of another checkpoint?"
        )
    spare = rows - pieces
    unused: list[PieceType] = ["unused"] * spare
    return Vocabulary(
        pieces=(*vocabulary.pieces, *(f"<row {pieces + index}>" for index in range(spare))),
        scores=(*vocabulary.scores, *(0.0,) * spare),
        types=(*vocabulary.types, *unused),
        bos=vocabulary.bos,
        eos=vocabulary.eos,
        pad=vocabulary.pad,
        unk=vocabulary.unk,
    )


def sentencepiece_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a SentencePiece model. Raises CheckpointError for any other file, and any but a Gemma's."""
    import sentencepiece  # noqa: F401  sets up the messages below
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # protobuf makes it

    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise CheckpointError(f"{path.name} cannot be read as a SentencePiece model: {error}.") from error
    trainer = proto.trainer_spec
    if not proto.pieces or trainer.model_type != trainer.BPE or proto.normalizer_spec.add_dummy_prefix:
        raise CheckpointError(f"{path} is not a Gemma's tokenizer: expected SentencePiece BPE without a dummy prefix.")
    names: dict[int, PieceType] = {
        1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused", 6: "byte",
    }  # fmt: skip
    return Vocabulary(
        pieces=tuple(piece.piece for piece in proto.pieces),
        scores=tuple(piece.score for piece in proto.pieces),
        types=tuple(names[piece.type] for piece in proto.pieces),
        bos=trainer.bos_id,
        eos=trainer.eos_id,
        pad=max(trainer.pad_id, 0),
        unk=trainer.unk_id,
    )


def json_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a fast tokenizer's file: the earlier two pieces are merged, the higher the result's score.

    Raises CheckpointError for a file that is not JSON or whose model is not BPE with byte fallback.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        bpe = raw["model"].get("type", "BPE") == "BPE" and raw["model"].get("byte_fallback", False)
        made = _from_json(raw["model"], raw.get("added_tokens", [])) if bpe else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name} cannot be read as a fast tokenizer's JSON: {error!r}.") from error
    if made is None:
        raise CheckpointError(f"{path} is not a Gemma's tokenizer: expected BPE with byte fallback.")
    return made


def _from_json(model: dict[str, Any], added: list[dict[str, Any]]) -> Vocabulary:
    ids: dict[str, int] = dict(model["vocab"])
    merges = model["merges"]
    type_of: dict[int, PieceType] = {
        index: "byte" if _BYTE.fullmatch(piece) else "normal" for piece, index in ids.items()
    }
    for token in added:
        ids[token["content"]] = token["id"]
        type_of[token["id"]] = "control" if token["special"] else "user_defined"
    size = max(ids.values()) + 1
    pieces = [f"<row {index}>" for index in range(size)]
    types: list[PieceType] = ["unused"] * size
    for piece, index in ids.items():
        pieces[index], types[index] = piece.replace(" ", "▁"), type_of[index]
    scores = [-float(len(merges) + 1)] * size
    for rank in reversed(range(len(merges))):
        merge = merges[rank]
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        whole = ids.get(left + right)
        if whole is not None:
            scores[whole] = -float(rank)
    unknown = ids.get("<unk>", 3)
    types[unknown] = "unknown"
    return Vocabulary(
        pieces=tuple(pieces),
        scores=tuple(scores),
        types=tuple(types),
        bos=ids.get("<bos>", 2),
        eos=ids.get("<eos>", 1),
        pad=ids.get("<pad>", 0),
        unk=unknown,
    )


def serialised(vocabulary: Vocabulary) -> bytes:
    """The vocabulary as a SentencePiece model: the contents of a `tokenizer.model`."""
    import sentencepiece  # noqa: F401  sets up the messages below
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # protobuf makes it

    proto, types = ModelProto(), ModelProto.SentencePiece
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(vocabulary.pieces)
    trainer.byte_fallback = True
    trainer.unk_id, trainer.unk_piece = vocabulary.unk, vocabulary.pieces[vocabulary.unk]
    trainer.bos_id, trainer.bos_piece = vocabulary.bos, vocabulary.pieces[vocabulary.bos]
    trainer.eos_id, trainer.eos_piece = vocabulary.eos, vocabulary.pieces[vocabulary.eos]
    trainer.pad_id, trainer.pad_piece = vocabulary.pad, vocabulary.pieces[vocabulary.pad]
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    kinds = {name: getattr(types, name.upper()) for name in set(vocabulary.types)}  # once, not for each of 262,144
    add = proto.pieces.add
    for piece, score, name in zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True):
        add(piece=piece, score=score, type=kinds[name])
    # SentencePiece needs exactly one unknown piece; Gemma 3's GGUF marks it as a control piece.
    proto.pieces[vocabulary.unk].type = types.UNKNOWN
    made: bytes = proto.SerializeToString()
    return made
