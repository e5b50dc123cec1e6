"""The largest magnitude of each sequence in a batch, over all tensors of interest, and where it stood.

Lighter than a recorder, which counts everything about every tensor: one reduction for each, and nothing leaves the
device before the pass has ended.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitykit.recorder.operators import traits
from stabilitykit.recorder.sites import Sites
from stabilitykit.searches.stored import Place


class RowPeaks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches passes of `model` over B sequences of one new token each.

    Every tensor that `places` names has B times as many elements as belong to one sequence, and those in a row.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Place]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places = places
        self._sites = Sites(model)
        self._rows = 0
        self._seen: list[Place] = []
        self._peaks: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard that True asks for imports the whole compiler, two seconds, on first use

    @contextmanager
    def watch(self, rows: int) -> Iterator[None]:
        """Around a pass of `rows` sequences; what was seen before is forgotten."""
        self._rows, self._seen, self._peaks = rows, [], []
        with ExitStack() as stack:
            self._sites.attach(stack)
            stack.enter_context(self)
            yield

    def found(self) -> tuple[list[float], list[Place]]:
        """For each sequence the largest magnitude and its place, the first of equals; inf for NaN and infinities."""
        largest, places = torch.stack(self._peaks).nan_to_num(nan=torch.inf, posinf=torch.inf).max(dim=0)
        return largest.tolist(), [self._seen[place] for place in places.tolist()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = traits(func)
        if kind.composite:
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if kind.view:
            return output
        site = self._sites.of_operator(kind, args, kwargs, output)
        place = None if site is None else self._places.get(site)
        if place is not None:
            self._seen.append(place)
            self._peaks.append(output.reshape(self._rows, -1).abs().amax(dim=1).float())
        return output
