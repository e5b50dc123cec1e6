"""Models that are larger than memory: every matrix is read from its file when it is needed, and dropped after that.

    stream(model, {"layers.0.mlp.up_proj.weight": StoredWeight(...), ...})

Between their turns parameters are placeholders of the right shape, dtype and device that hold a single NaN. When a
module is called, those of its own are brought in, cast, and put in their place for the duration of its `forward`.
So what is resident is the largest module's weights, of an embedding only the rows that are looked up, and all vectors,
which stay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from stabilitykit.checkpoints.mapped import empty_like, give_back, pieces, read_once

STREAMED = "streamed: each matrix of weights was in memory only while it was in use"
"""What every report of such a model says, as a note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """A weight that `read` gives as it is stored, best memory-mapped, and that runs as `cast` makes it."""

    read: Callable[[], Tensor]
    dtype: torch.dtype
    device: torch.device
    factor: float = 1.0

    def placeholder(self, shape: Sequence[int]) -> Tensor:
        """Stands for the weight and takes no memory; whoever used it would see NaN."""
        return torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(shape)

    def whole(self) -> Tensor:
        """The weight, cast a few rows at a time; as it is mapped where there is nothing to cast."""
        stored = self.read()
        if self._as_it_is(stored):
            return stored
        made = self._empty(stored)
        for piece, place in zip(read_once(stored), pieces(made), strict=True):
            place.copy_(piece if self.factor == 1.0 else cast(piece, self.factor, self.dtype, self.device))
        return made

    def rows(self, ids: Tensor) -> Tensor:
        """As `whole`, but only the rows `ids` hold anything, and on most systems only they take memory."""
        stored = self.read()
        if self._as_it_is(stored):
            return stored
        used = torch.unique(ids)
        made = self._empty(stored, sparse=True)
        made[used] = cast(stored[used.cpu()], self.factor, self.dtype, self.device)
        give_back(stored)
        return made

    def _empty(self, stored: Tensor, *, sparse: bool = False) -> Tensor:
        if self.device.type == "cpu" and stored.is_contiguous() and stored.numel():
            return empty_like(stored, self.dtype, sparse=sparse)
        return torch.empty_like(stored, dtype=self.dtype, device=self.device)

    def _as_it_is(self, stored: Tensor) -> bool:
        return self.factor == 1.0 and stored.dtype == self.dtype and stored.device == self.device


def cast(tensor: Tensor, factor: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`tensor` times `factor`, a power of two, in at least float32, rounded once to `dtype`, ties to even."""
    if factor != 1.0:
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor
    return tensor.to(dtype).to(device)


def stored_weight(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer `name`, of a streamed model as it is stored, before a factor and a cast."""
    stored: Mapping[str, StoredWeight] = getattr(model, "stored_weights", {})
    if name in stored:
        return stored[name].read()
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), leaf)
    return found.detach()


def stream(model: nn.Module, weights: Mapping[str, StoredWeight]) -> None:
    """From here on the parameters named in `weights` are brought in by each call that needs them.

    What they are until now is dropped, and need not be more than a shape: they may be on "meta". One that several
    modules share is in place in all of them while one of them runs, so that it keeps the name of the first. Parameters
    must be used in the `forward` of the module that they belong to, and nowhere else. `stored_weight` reads one.
    """
    model.stored_weights = weights  # type: ignore[assignment]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    homes: dict[str, list[_Home]] = {name: [] for name in weights}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and names[id(parameter)] in weights:
                homes[names[id(parameter)]].append((module, leaf))
    for name, places in homes.items():
        shape = getattr(*places[0]).shape
        turn = _Turn(weights[name], places, nn.Parameter(weights[name].placeholder(shape), requires_grad=False))
        turn.put(turn.placeholder)
        for module, _ in places:
            module.register_forward_pre_hook(turn.begin, with_kwargs=True)
            module.register_forward_hook(turn.end, always_call=True)


_Home = tuple[nn.Module, str]


@dataclass(slots=True)
class _Turn:
    """A weight and the places it has in a model."""

    weight: StoredWeight
    homes: list[_Home]
    placeholder: nn.Parameter

    def put(self, parameter: nn.Parameter) -> None:
        for module, leaf in self.homes:
            setattr(module, leaf, parameter)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with _disable_current_modes(), torch.no_grad():  # an observer of operators is not meant to see these
            ids = None
            if isinstance(module, nn.Embedding):
                ids = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            made = self.weight.whole() if ids is None else self.weight.rows(ids)
            self.put(nn.Parameter(made, requires_grad=False))

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        used = getattr(*self.homes[0])
        self.put(self.placeholder)
        give_back(used)
