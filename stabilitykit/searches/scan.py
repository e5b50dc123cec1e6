"""Many tokens, each as the next one after the same context: the largest magnitude at each.

It is over what the token's own pass stores, as in decoding. A prefill stores the scores of earlier queries with the
token's key too, before the mask hides them; the recorder that confirms a prompt counts those.
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
"""Called with the number done and the total."""

_ROWS = 512  # on a CPU: enough to hide the overhead per operator, while a layer's tensors stay in the caches
_ROWS_ON_A_DEVICE = 4096


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest magnitude at a token's position, as the scanned model computes it, and its tensor; inf for NaN."""

    value: float
    place: Place


class Scanner:
    """One model and those of its tensors that count; a scan runs one position for each candidate."""

    def __init__(self, model: Gemma) -> None:
        self.model = model
        self._peaks = RowPeaks(model, stored_places(model))
        self._rows = _ROWS if model.device.type == "cpu" else _ROWS_ON_A_DEVICE

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def scan(self, candidates: Sequence[int], context: Sequence[int] = (), progress: Count | None = None) -> list[Peak]:
        """The peak of each of `candidates` when it follows `context`, in their order."""
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


class _BodyEnded(Exception):  # noqa: N818  not an error: the logits are not needed
    """Ends a pass before the head."""


def _stop(module: object, args: object) -> None:
    raise _BodyEnded
