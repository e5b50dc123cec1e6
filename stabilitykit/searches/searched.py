"""The models of a search, each opened once: the kit's own Gemma in three dtypes, or transformers' in two."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.checkpoint import PieceType, Vocabulary
from stabilitykit.models import transformers as hf
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.subject import Subject
from stabilitykit.run.case import Progress, stage
from stabilitykit.run.prompts import around
from stabilitykit.searches.confirm import PromptRecorder
from stabilitykit.searches.rows import RowScanner
from stabilitykit.searches.scan import Count, Peak, Scanner
from stabilitykit.searches.text import ReadsBack


class Scans(Protocol):
    """A model that many tokens are tried on; `dtype` is its own."""

    @property
    def dtype(self) -> str: ...

    def scan(self, candidates: Sequence[int], context: Sequence[int] = (), progress: Count | None = None) -> list[Peak]:
        """The peak of each of `candidates` when it follows `context`, in their order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """`low` is the model in the dtype that is searched, `wide` in float32, `sieve` in a fast one, which may be `wide`.

    `begin` is what the tokenizer puts before a text, `<bos>` for most and nothing for some. `vocabulary` says
    what the tokens are.
    """

    low: Subject
    wide: Scans
    sieve: Scans
    recorder: PromptRecorder
    vocabulary: Vocabulary
    tokenizer: ReadsBack
    begin: tuple[int, ...]
    context: int


def searched(
    opened: Checkpoint | hf.HuggingFaceFolder, dtype: str, sieve: str | None, device: str, progress: Progress | None
) -> Searched:
    """The models of `opened`. `sieve` is the fast dtype of the kit's own; transformers' looks in float32 at once."""
    if isinstance(opened, Checkpoint):
        return _of_checkpoint(opened, dtype, sieve or fastest(device), device, progress)
    return _of_folder(opened, dtype, device, progress)


def _of_checkpoint(checkpoint: Checkpoint, dtype: str, sieve: str, device: str, progress: Progress | None) -> Searched:
    def built(name: str) -> Gemma:
        announce = stage(f"{name}: preparing weights", progress)
        return build(checkpoint, dtype=name, device=device, progress=announce)

    low, wide = built(dtype), Scanner(built("float32"))
    fast = wide if sieve == "float32" else Scanner(low if sieve == dtype else built(sieve))
    return Searched(
        low=GemmaSubject(low),
        wide=wide,
        sieve=fast,
        recorder=PromptRecorder(wide.model),
        vocabulary=checkpoint.vocabulary,
        tokenizer=wide.model.tokenizer or Tokenizer(checkpoint.vocabulary),
        begin=(checkpoint.vocabulary.bos,),
        context=checkpoint.config.context,
    )


def _of_folder(folder: hf.HuggingFaceFolder, dtype: str, device: str, progress: Progress | None) -> Searched:
    def opened(name: str) -> hf.HuggingFaceModel:
        announce = stage(f"{name}: preparing weights", progress)
        return hf.open_model(folder.name, dtype=name, device=device, progress=announce)

    low, wide = opened(dtype), opened("float32")
    begin, end = around(folder.tokenizer)
    recorder = PromptRecorder(wide, begin, end)
    scanner = RowScanner(recorder)
    return Searched(
        low=low,
        wide=scanner,
        sieve=scanner,
        recorder=recorder,
        vocabulary=_vocabulary(folder.tokenizer, len(wide.causal.get_input_embeddings().weight)),
        tokenizer=folder.tokenizer,
        begin=begin,
        context=wide.context,
    )


def _vocabulary(tokenizer: hf.HuggingFaceTokenizer, rows: int) -> Vocabulary:
    """The tokens that have a row in the embedding, and what each is."""
    pieces = tuple(map(tokenizer.piece, range(min(rows, len(tokenizer.tokenizer)))))
    special = set(tokenizer.tokenizer.all_special_ids)

    def kind(index: int, piece: str) -> PieceType:
        if index in special:
            return "control"
        return "byte" if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else "normal"

    types = tuple(kind(index, piece) for index, piece in enumerate(pieces))
    return Vocabulary(pieces=pieces, scores=(0.0,) * len(pieces), types=types)


def fastest(device: str) -> str:
    """bfloat16 where the device multiplies it faster than float32, else float32."""
    if device.startswith("cpu"):
        has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # torch has no public name for it
        return "bfloat16" if has_bfloat16() else "float32"
    return "bfloat16" if device.startswith("cuda") else "float32"
