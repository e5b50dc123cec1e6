"""The kit's own model as a run wants it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.models.gemma.generate import decode
from stabilitykit.models.gemma.model import Gemma, blank
from stabilitykit.models.subject import Continuation, Saw


@dataclass(frozen=True, slots=True)
class GemmaSubject:
    """A Subject."""

    module: Gemma

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.module.layers)

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def context(self) -> int:
        return self.module.config.context

    @property
    def pad(self) -> int:
        return 0 if self.module.vocabulary is None else self.module.vocabulary.pad

    @property
    def source(self) -> str:
        return self.module.source

    @property
    def sha256(self) -> str:
        return self.module.sha256

    @property
    def notes(self) -> tuple[str, ...]:
        return self.module.notes

    @property
    def facts(self) -> dict[str, Any]:
        return {"rounding": self.module.rounding, "rescale": self.module.rescale}

    @property
    def generates(self) -> bool:
        return True

    def arguments(self, ids: Tensor, padding: Tensor | None = None) -> dict[str, Any]:
        return {"tokens_BT": ids, "padding": padding}

    def piece(self, token: int) -> str:
        tokenizer = self.module.tokenizer
        return f"<row {token}>" if tokenizer is None else tokenizer.piece(token)

    def blank(self, dtype: torch.dtype) -> nn.Module:
        return blank(self.module.config, dtype, self.module.rounding)

    def decode(self, ids: Tensor, how: Continuation, saw: Saw) -> list[list[int]]:
        return decode(self.module, ids, how, saw)
