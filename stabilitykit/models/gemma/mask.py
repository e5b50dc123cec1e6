"""Which keys a query may look at: 0 where it may, else a large negative number, to be added to its scores."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.query_blocks import QueryBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMask:
    """Of `queries` new tokens, the last of `keys`: no later key, none outside of `window`, no padding.

    `padding` [B, K], boolean, is True where a real token stands. `blocked` is the number that hides, and `dtype` that
    of the mask. Raises MisuseError where `padding` has another shape.
    """

    batch: int
    queries: int
    keys: int
    window: int | None
    padding: Tensor | None
    dtype: torch.dtype
    blocked: float
    device: torch.device

    def __post_init__(self) -> None:
        if self.padding is not None and self.padding.shape != (self.batch, self.keys):
            raise MisuseError(
                f"Padding says of each of [{self.batch}, {self.keys}] tokens whether it is real; it is "
                f"{list(self.padding.shape)}."
            )

    def whole(self) -> Tensor:
        """[B or 1, 1, T, K]."""
        return self._between(0, self.queries, 0, self.keys)

    def of(self, block: QueryBlock) -> Tensor:
        """What stands in a block's rows and columns."""
        return self._between(block.start, block.stop, block.first_key, block.last_key)

    def _between(self, start: int, stop: int, first_key: int, last_key: int) -> Tensor:
        past = self.keys - self.queries
        query_T1 = torch.arange(past + start, past + stop, device=self.device)[:, None]
        key_K = torch.arange(first_key, last_key, device=self.device)
        allowed = key_K <= query_T1
        if self.window is not None:
            allowed = allowed & (key_K > query_T1 - self.window)
        allowed = allowed[None, None]
        if self.padding is not None:
            real = self.padding[:, first_key:last_key].to(device=self.device, dtype=torch.bool)
            allowed = allowed & real[:, None, None, :]
        return torch.where(allowed, torch.zeros((), dtype=self.dtype, device=self.device), self.blocked)
