"""What a run asks of a model, whoever wrote it, and how it has the model continue a prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stabilitykit.models.machine import Examined

Saw = Callable[[Tensor], bool]
"""Called with each step's logits before a token is drawn from them; where it returns True, that token is the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """gemma_pytorch's defaults. `temperature` None or 0 is greedy; `seed` is the draw's, None for torch's generator."""

    temperature: float | None = 1.0
    top_p: float = 0.95
    top_k: int = 64
    seed: int | None = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """How a prompt [B, T] is continued: by `new_tokens`, or up to an end-of-sequence token.

    `padding` [B, T] is True where a real token stands. `mask` [B or 1, 1, T, T], floating, replaces the model's own for
    the one token that it serves. The logits of a step are those of its last position [B, 1, V], or of all, [B, T, V],
    with `every_logit`.
    """

    new_tokens: int = 1
    sampling: Sampling = Sampling()
    padding: Tensor | None = None
    mask: Tensor | None = None
    every_logit: bool = False


class Subject(Examined, Protocol):
    """A model to record. `module` is what is recorded, `layers` are its decoder layers, `context` counts tokens.
    `generates`: it continues a text token by token; one that does not reads it once, and its output is judged.

    `source`, `sha256` and `notes` say where it comes from, as in a Checkpoint; `module` has them too, for a recorder to
    read. `facts` say what was chosen about it.
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def layers(self) -> Sequence[nn.Module]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def context(self) -> int: ...
    @property
    def pad(self) -> int: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def generates(self) -> bool: ...

    def piece(self, token: int) -> str:
        """A token as a table shows it."""
        ...

    def arguments(self, ids: Tensor, padding: Tensor | None = None) -> dict[str, Any]:
        """What `module`, or a blank one, is called with to read token ids [B, T] in one pass, by name; `padding` [B, T]
        is True where a real token stands.
        """
        ...

    def blank(self, dtype: torch.dtype) -> nn.Module | None:
        """The same model in `dtype` on the meta device, where nothing has a value; None where none can be made."""
        ...

    def decode(self, ids: Tensor, how: Continuation, saw: Saw) -> list[list[int]]:
        """The new token ids of each row, none where the model only reads, which `saw` then sees nothing of.

        Raises MisuseError for what this model cannot do.
        """
        ...
