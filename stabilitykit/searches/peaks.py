"""The largest magnitude of each sequence in a batch, over all tensors of interest, and where it stood.

Lighter than a recorder, which counts everything about every tensor: one reduction for each, and nothing leaves the
device before the pass has ended.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.models.operators import OperatorMode, Traits
from stabilitykit.recorder.names import Names
from stabilitykit.searches.stored import Place


class RowPeaks:
    """Watches passes of `model` over B sequences of one new token each.

    Every tensor that `places` names has B times as many elements as belong to one sequence, and those in a row.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Place]) -> None:
        self._places = places
        self._names = Names(model)
        self._rows = 0
        self._seen: list[Place] = []
        self._peaks: list[Tensor] = []

    @contextmanager
    def watch(self, rows: int) -> Iterator[None]:
        """Around a pass of `rows` sequences; what was seen before is forgotten."""
        self._rows, self._seen, self._peaks = rows, [], []
        with ExitStack() as stack:
            self._names.attach(stack)
            stack.enter_context(OperatorMode(self._run))
            yield

    def found(self) -> tuple[list[float], list[Place]]:
        """For each sequence the largest magnitude and its place, the first of equals; inf for NaN and infinities."""
        largest, places = torch.stack(self._peaks).nan_to_num(nan=torch.inf, posinf=torch.inf).max(dim=0)
        return largest.tolist(), [self._seen[place] for place in places.tolist()]

    def _run(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = kind.func(*args, **kwargs)
        site = self._names.of_operator(kind, args, kwargs, output)
        place = None if site is None else self._places.get(site)
        if place is not None:
            self._seen.append(place)
            self._peaks.append(output.reshape(self._rows, -1).abs().amax(dim=1).float())
        return output
