"""What a case can run: a model with the little around it that a case asks for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stabilitykit.models.gemma import Gemma
from stabilitykit.models.gemma.generate import decode


class Subject(Protocol):
    """A model to record. `module` is what is recorded, `layers` are its decoder layers, `context` counts tokens.

    `source`, `sha256` and `notes` say where it comes from, as in a Checkpoint; `facts` what was chosen about it.
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
    def source(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def facts(self) -> dict[str, Any]: ...

    def piece(self, token: int) -> str:
        """A token as a table shows it."""
        ...

    def blank(self, dtype: torch.dtype) -> nn.Module | None:
        """The same model in `dtype` on the meta device, where nothing has a value; None where none can be made."""
        ...

    def decode(
        self,
        ids: Tensor,
        *,
        max_new_tokens: int,
        temperature: float | None,
        top_p: float,
        top_k: int,
        seed: int,
        padding: Tensor | None,
        mask: Tensor | None,
        every_logit: bool,
        saw: Callable[[Tensor], bool],
    ) -> list[list[int]]:
        """As `stabilitykit.models.gemma.generate.decode`; raises MisuseError for what this model cannot do."""
        ...


@dataclass(frozen=True, slots=True)
class GemmaSubject:
    """The kit's own model."""

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

    def piece(self, token: int) -> str:
        tokenizer = self.module.tokenizer
        return f"<row {token}>" if tokenizer is None else tokenizer.piece(token)

    def blank(self, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            model = Gemma(self.module.config, rounding=self.module.rounding)
        model.lm_head.weight = model.embed_tokens.weight
        return model.to(dtype).eval()

    def decode(self, ids: Tensor, **how: Any) -> list[list[int]]:
        return decode(self.module, ids, **how)
