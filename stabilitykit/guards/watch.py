"""What is looked at while a step runs: the largest magnitude of each row, one small reduction a tensor."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.recorder.pending import transfer
from stabilitykit.recorder.tensors import aside

Watch = Literal["logits", "residual"]
Part = Literal["residual", "final norm", "logits", "scores"]


@dataclass(frozen=True, slots=True)
class Looked:
    """One watched tensor: `largest` has a number for each row, NaN or infinite where the row is not finite."""

    part: Part
    site: str
    dtype: str
    largest: NDArray[np.float64]


@dataclass(slots=True)
class Watched:
    """The watched tensors of one step, on their device until `read`."""

    _tensors: list[tuple[Part, str, torch.dtype, Tensor]] = field(default_factory=list)

    def look(self, part: Part, site: str, tensor: Tensor, real: Tensor | None) -> None:
        """At `tensor` [B, T, C] or [B, C], where `real` [B, T] tells padding from tokens. Nothing waits for a device.

        Of logits the largest of each position counts: -inf hides a token and is none but where it hides all.
        """
        with _aside():
            kept = tensor if part == "logits" else tensor.abs()
            if tensor.ndim == 3 and real is not None and real.shape == tensor.shape[:2]:
                largest = kept.amax(-1)
                largest = largest.where(real.to(largest.device), 0).abs().amax(1)
            elif part == "logits":
                largest = kept.amax(-1).abs().flatten(1).amax(1) if tensor.ndim > 2 else kept.amax(-1).abs()
            else:
                largest = kept.flatten(1).amax(1)
        self._tensors.append((part, site, tensor.dtype, largest))

    def add(self, part: Part, site: str, numbers: Tensor) -> None:
        """A number for each row that is there already, to cross with the others."""
        self._tensors.append((part, site, numbers.dtype, numbers))

    def read(self, rows: int) -> list[Looked]:
        """All of them, in one transfer: the only wait for the device. Those of another number of rows are left out."""
        kept = [one for one in self._tensors if one[3].shape == (rows,)]
        if not kept:
            return []
        device = kept[-1][3].device
        dtype = reduce(torch.promote_types, (one[2] for one in kept), torch.float32)
        with _aside():
            numbers = torch.cat([one[3].to(device, dtype, non_blocking=True) for one in kept])
        host = np.asarray(transfer(numbers).wait(), np.float64).reshape(len(kept), rows)
        return [
            Looked(part, site, str(own).removeprefix("torch."), host[at])
            for at, (part, site, own, _) in enumerate(kept)
        ]


def _aside() -> AbstractContextManager[Any]:
    """As `aside`, which costs more than a reduction, where there is an operator mode to hide from."""
    return aside() if torch._C._len_torch_dispatch_stack() else torch.no_grad()
