"""What a checkpoint of any format is read into."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from stabilitykit.checkpoints.config import GemmaConfig

if TYPE_CHECKING:
    from torch import Tensor

PieceType = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A SentencePiece BPE vocabulary with byte fallback and without a dummy prefix, in order of token id.

    `pieces` are in SentencePiece's notation: every space is `▁`, in user-defined pieces too. `scores` are the merge
    priorities: the pair with the highest score is merged first.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[PieceType, ...]
    bos: int = 2
    eos: int = 1
    pad: int = 0
    unk: int = 3


class LazyTensors(Mapping[str, "Tensor"]):
    """Tensors by name, each computed by `make(name)` whenever it is requested, so that none has to stay in memory."""

    def __init__(self, names: Iterable[str], make: Callable[[str], "Tensor"]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> "Tensor":
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Config, weights and vocabulary of one Gemma.

    `tensors` is keyed by Hugging Face's parameter names without the leading `model.`
    (`embed_tokens.weight`, `layers.3.self_attn.q_proj.weight`); norm gains are `w`, applied as `1 + w`. Tensors are
    memory-mapped where the format allows it: copy before writing to one. `sha256` is that of the file, or of the
    description of random weights. `notes` are facts that every report repeats, such as how the weights were
    quantised; one that begins with "only" limits what was examined, and every verdict ends with it. `blocks` says of
    dequantised tensors how many elements in a row had a scale in common.
    """

    source: str
    sha256: str
    config: GemmaConfig
    tensors: Mapping[str, "Tensor"]
    vocabulary: Vocabulary
    notes: tuple[str, ...] = field(default=())
    blocks: Mapping[str, int] = field(default_factory=dict)
