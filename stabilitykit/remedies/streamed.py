"""A folder's model, scaled while it runs: each matrix is read, scaled and cast when it is needed.

So a model can be run whose weights in float32 are more than memory should hold.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.checkpoints.huggingface import tensors_of, weight_files
from stabilitykit.checkpoints.mapped import give_back
from stabilitykit.models.stream import StoredWeight, stream
from stabilitykit.models.transformers.backend import imported
from stabilitykit.models.transformers.plain import aligned, load_placeholders, load_plain, read_settings
from stabilitykit.models.transformers.stored_names import ONE, by_every_name, placeholders, values
from stabilitykit.records.scaling import Factor
from stabilitykit.scaling.apply import scaled

HELD = 4 << 30
"""Bytes that weights may have in float32; models with more are streamed, in each dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model, and those of its parameters that are placeholders but while they are in use."""

    module: nn.Module
    weights: Mapping[str, StoredWeight] = field(default_factory=dict)

    def value(self, name: str) -> Tensor:
        """A parameter or a buffer."""
        if name in self.weights:
            return self.weights[name].whole()
        path, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.module.get_submodule(path), leaf)
        return found

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and persistent buffers by each of their names."""
        first = {id(parameter): name for name, parameter in self.module.named_parameters()}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            yield name, self.value(first.get(id(tensor), name))


def open_scaled(
    folder: Path,
    factors: Mapping[str, Factor] | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    kind: Any = None,
    trust_remote_code: bool = False,
) -> Opened:
    """The folder's model in `dtype`, its parameters multiplied by `factors`, its config replaced by `settings`.

    In memory it is as plain transformers loads it; streamed, it is what transformers makes of the names and shapes of
    the stored tensors, with their values. Quantised weights are never streamed. Raises as `load_plain` and
    `stored_factors` do.
    """
    given: dict[str, Any] = {"kind": kind, "trust_remote_code": trust_remote_code, "settings": settings}
    stored = {name: tensor for path in weight_files(folder) for name, tensor in tensors_of(path).items()}
    small = read_settings(folder, trust_remote_code=trust_remote_code).get("quantization_config") is not None
    if small or 4 * sum(tensor.numel() for tensor in stored.values()) <= HELD:
        model = load_plain(folder, dtype, **given)
        scale(model, factors or {})
        return Opened(module=model)
    blank = placeholders({name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()})
    model = load_placeholders(folder, blank, dtype, **given)
    by_name = by_every_name(model, stored, factors or {})
    weights = {}
    for name, tensor in list(model.named_parameters()):
        weight = _stored(tensor, by_name[name], stored)
        if tensor.ndim > 1:
            weights[name] = weight
        else:
            put(model, tensor, weight.whole())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            put(model, buffer, _stored(buffer, by_name[name], stored).whole())
    if (folder / "generation_config.json").is_file():
        model.generation_config = imported().GenerationConfig.from_pretrained(folder)
    stream(model.eval().requires_grad_(False), weights)
    return Opened(module=model, weights=weights)


def _stored(tensor: Tensor, factor: Factor, stored: Mapping[str, Tensor]) -> StoredWeight:
    """What is read for a parameter; a factor of one block is left to the cast, which reads a few rows at a time."""

    def plain() -> Tensor:
        found = values(tensor, stored)
        return aligned(found) if found.dtype == tensor.dtype else found  # else it is cast, into memory of its own

    def changed() -> Tensor:
        found = values(tensor, stored)
        made = scaled(found, factor)
        give_back(found)
        return made

    whole = not factor.ends and not factor.added
    return StoredWeight(
        read=plain if whole else changed,
        dtype=tensor.dtype,
        device=torch.device("cpu"),
        factor=2.0 ** factor.exponents[0] if whole else 1.0,
    )


def scale(model: nn.Module, factors: Mapping[str, Factor]) -> None:
    """Multiplies parameters and persistent buffers of a model that is in memory."""
    given = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, factor in factors.items():
        if factor != ONE:
            put(model, given[name], scaled(given[name], factor).to(given[name].dtype))


def put(model: nn.Module, before: Tensor, made: Tensor) -> None:
    """Replaces a parameter or a buffer, in all the modules that share it."""
    for module in model.modules():
        for leaf, held in list(module._parameters.items()):
            if held is before:
                module._parameters[leaf] = nn.Parameter(made, requires_grad=False)
        for leaf, kept in list(module._buffers.items()):
            if kept is before:
                module._buffers[leaf] = made
