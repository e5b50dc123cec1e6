"""Elements of a model's weights and buffers that are no numbers, and what they are in float32."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.scaling.apply import tensors_by_name
from stabilitykit.trials.reproduction import Kept
from stabilitykit.trials.situation import Situation

_MOST = 64  # elements of a tensor that are named

Element = tuple[str, tuple[int, ...]]
"""A tensor's name, and an index in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A tensor of a model: of its `lost` elements that are no numbers the first ones, with their values."""

    name: str
    is_buffer: bool
    dtype: str
    lost: int
    has_nan: bool
    indices: tuple[tuple[int, ...], ...]
    values: tuple[float, ...]


def held_by(model: nn.Module) -> Iterator[Held]:
    """The parameters and buffers that hold NaN or infinities."""
    named: list[tuple[str, Tensor, bool]] = [(name, one, False) for name, one in model.named_parameters()]
    named += [(name, one, True) for name, one in model.named_buffers()]
    for name, tensor, is_buffer in named:
        if not tensor.is_floating_point() or tensor.element_size() == 1 or tensor.is_meta:
            continue
        values = tensor.detach()
        bad = ~values.isfinite()
        if not bool(bad.any()):
            continue
        places = bad.nonzero()[:_MOST].tolist()
        yield Held(
            name=name,
            is_buffer=is_buffer,
            dtype=str(tensor.dtype).removeprefix("torch."),
            lost=int(bad.sum()),
            has_nan=bool(values.isnan().any()),
            indices=tuple(map(tuple, places)),
            values=tuple(float(values[tuple(place)]) for place in places),
        )


def wide_like(models: Kept, model: nn.Module, dtype: str = "float32") -> nn.Module:
    """The model in a wider dtype, with the names of `model`: an adapter is merged where it is merged in that."""
    wide: Any = models.model(dtype)
    if hasattr(wide, "merge_and_unload") and not hasattr(model, "merge_and_unload"):
        adapted: Any = models.of.model(dtype)  # another one, for merging changes it
        wide = adapted.merge_and_unload()
    made: nn.Module = wide
    return made


def wide_values(situation: Situation, found: Sequence[Held]) -> dict[Element, float]:
    """The same elements in the model in float32; NaN for what that model has under another name, or not at all."""
    wide = wide_like(situation.models, situation.model)
    held = tensors_by_name(wide)
    values: dict[Element, float] = {}
    for one in found:
        tensor = held.get(one.name)
        for index in one.indices:
            fits = tensor is not None and len(index) == tensor.ndim
            values[one.name, index] = float(tensor.detach()[index]) if fits and tensor is not None else torch.nan
    return values
