"""What every checkpoint format is read into."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from stabilitykit.checkpoints.config import GemmaConfig

if TYPE_CHECKING:
    from torch import Tensor

PieceType = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A SentencePiece BPE vocabulary with byte fallback and no dummy prefix, in the order of the ids.

    `pieces` are written as SentencePiece wants them: every space is `▁`, in user-defined pieces too.
    `scores` are the merge priorities, higher first.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[PieceType, ...]
    bos: int = 2
    eos: int = 1
    pad: int = 0
    unk: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Config, weights and vocabulary of one Gemma.

    `tensors` is keyed by Hugging Face's parameter names without the leading `model.`
    (`embed_tokens.weight`, `layers.3.self_attn.q_proj.weight`); norm gains are `w`, applied as `1 + w`.
    The tensors are memory-mapped where the format allows: copy before writing to one. `sha256` is that of
    the file, or of the text that describes random weights. `notes` are facts that every report
    repeats, such as how the weights were quantised; one that begins with "only" limits what was examined, and every
    verdict ends with it.
    """

    source: str
    sha256: str
    config: GemmaConfig
    tensors: Mapping[str, "Tensor"]
    vocabulary: Vocabulary
    notes: tuple[str, ...] = field(default=())
