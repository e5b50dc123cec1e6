"""Keys and values of the tokens already seen."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from stabilitykit.checkpoints.config import GemmaConfig
from stabilitykit.errors import MisuseError


class KVCache:
    """Room for `length` tokens of `batch` sequences, allocated once and filled from the left.

    Every layer keeps all tokens, local layers too: their window is the mask's business. The room is
    2 · layers · batch · kv_heads · length · head_dim elements of `dtype`; what is not yet written is zero.
    """

    def __init__(
        self,
        config: GemmaConfig,
        *,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, config.kv_heads, length, config.head_dim)
        self.length = length
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self._held = 0

    def get_seq_length(self) -> int:
        """Tokens held: those of every completed forward pass."""
        return self._held

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the T new tokens of one layer; return views of all its keys and values, old and new.

        Only the new slice is written. The tokens count as held after `advance`, so every layer of one pass
        writes to the same place, and a pass that failed halfway leaves nothing behind. Raises MisuseError
        when the tokens do not fit.
        """
        tokens = k_BKTD.shape[2]
        end = self._held + tokens
        if end > self.length:
            raise MisuseError(
                f"This KV cache was allocated for {self.length} tokens; {self._held} held and {tokens} new ones are "
                f"{end}. Allocate prompt plus new tokens."
            )
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self._held : end] = k_BKTD
        values[:, :, self._held : end] = v_BKTD
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as held, once every layer has written them."""
        self._held += tokens

    def copied(
        self, *, rows: Sequence[int] | None = None, held: int | None = None, dtype: torch.dtype | None = None
    ) -> "KVCache":
        """A copy of some rows, or all, as it was when it held `held` tokens; in `dtype`, or its own.

        What was written after them is still there, and counts as not yet written.
        """
        made = copy.copy(self)
        chosen = slice(None) if rows is None else list(rows)
        made._keys = [keys[chosen].to(dtype or keys.dtype, copy=True) for keys in self._keys]
        made._values = [values[chosen].to(dtype or values.dtype, copy=True) for values in self._values]
        made._held = self._held if held is None else held
        return made
