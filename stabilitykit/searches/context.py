"""The keys and values of a context, computed once and shared by all sequences that continue it by one token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stabilitykit.models.gemma import Gemma
from stabilitykit.models.gemma.kv_cache import KVCache


class SharedContext(KVCache):
    """A cache that holds `tokens` whatever continues them: only the pass that adds keys and values sees them."""

    def __init__(self, model: Gemma, tokens: Sequence[int]) -> None:
        super().__init__(model.config, batch=1, length=len(tokens), dtype=model.dtype, device=model.device)
        self._is_full = False
        with torch.inference_mode():
            model(torch.tensor([tokens], device=model.device), cache=self, last_only=True)
        self._is_full = True

    def update(self, layer: int, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of the context, for each sequence, and the new ones after them."""
        if not self._is_full:
            return super().update(layer, new_keys, new_values)
        return _continued(self._keys[layer], new_keys), _continued(self._values[layer], new_values)

    def advance(self, tokens: int) -> None:
        if not self._is_full:
            super().advance(tokens)


def _continued(held: Tensor, new: Tensor) -> Tensor:
    return torch.cat((held.expand(len(new), -1, -1, -1), new), dim=2)
