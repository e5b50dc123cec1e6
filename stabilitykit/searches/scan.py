"""Many tokens, each as the next one of the same context: the largest magnitude that each brings.

That is of what the token's own pass stores, as in decoding. A prompt that is read at once stores the scores of earlier
queries with its key too, before a mask hides them: a recorder, which confirms, counts these.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.models.gemma import Gemma
from stabilitykit.searches.context import SharedContext
from stabilitykit.searches.peaks import RowPeaks
from stabilitykit.searches.stored import Place, stored_places

Count = Callable[[int, int], None]
"""Called with how many are done, and how many there are."""

_ROWS = 512  # on a CPU: enough to hide what each operator costs, and a layer's tensors stay in its caches
_ROWS_ON_A_DEVICE = 4096


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest magnitude at a token's position, as the scanned model computes it, and where; inf for NaN too."""

    value: float
    place: Place


class Scanner:
    """One model and the tensors of it that count; each scan is one position for each candidate."""

    def __init__(self, model: Gemma) -> None:
        self.model = model
        self._peaks = RowPeaks(model, stored_places(model))
        self._rows = _ROWS if model.device.type == "cpu" else _ROWS_ON_A_DEVICE

    def scan(self, candidates: Sequence[int], context: Sequence[int] = (), progress: Count | None = None) -> list[Peak]:
        """For each of `candidates` what stands at its position when it follows `context`, in their order."""
        cache = SharedContext(self.model, context) if context else None
        found: list[Peak] = []
        handle = self.model.lm_head.register_forward_pre_hook(_stop)
        try:
            for start in range(0, len(candidates), self._rows):
                batch = candidates[start : start + self._rows]
                tokens = torch.tensor(batch, device=self.model.device)[:, None]
                found += self._pass(tokens, cache)
                if progress is not None:
                    progress(len(found), len(candidates))
        finally:
            handle.remove()
        return found

    def _pass(self, tokens: Tensor, cache: SharedContext | None) -> list[Peak]:
        with torch.inference_mode(), self._peaks.watch(len(tokens)), suppress(_BodyEnded):
            self.model(tokens, cache=cache)
        return [Peak(value, place) for value, place in zip(*self._peaks.found(), strict=True)]


class _BodyEnded(Exception):  # noqa: N818  no error: the logits are not wanted
    """Ends a pass before the head."""


def _stop(module: object, args: object) -> None:
    raise _BodyEnded
