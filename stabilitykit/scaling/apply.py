"""A scaling applied: to a tensor, a model's parameters, or the settings of a config."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.records.scaling import Factor


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by its own names for them, as a Scaling has them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def factors(factor: Factor, shape: torch.Size) -> Tensor:
    """What multiplies each element of a tensor of this shape: float32, of size 1 along dimensions of one block."""
    made = torch.tensor(factor.exponents, dtype=torch.float32).exp2()
    made = made.reshape([len(factor.ends.get(dim, (0,))) for dim in range(len(shape))])
    for dim, ends in factor.ends.items():
        sizes = torch.tensor(ends).diff(prepend=torch.tensor([0]))
        made = made.repeat_interleave(sizes, dim)
    return made


def scaled(tensor: Tensor, factor: Factor) -> Tensor:
    """`tensor` times `factor`, in float32 (float64 stays): exact, but for gains c + w, which may be rounded once.

    Exact as long as no result is subnormal or past the maximum. NaN and infinities stay, and so do zeros but for those
    of a gain.
    """
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    times = factors(factor, tensor.shape).to(wide)
    return (wide + factor.added) * times - factor.added if factor.added else wide * times


def of_rows(factor: Factor, start: int, stop: int) -> Factor:
    """The factor of the rows from `start` up to `stop` of a tensor that `factor` multiplies."""
    ends = factor.ends.get(0)
    if ends is None:
        return factor
    starts = (0, *ends[:-1])
    kept = [index for index, (first, end) in enumerate(zip(starts, ends, strict=True)) if first < stop and end > start]
    each = len(factor.exponents) // len(ends)
    return Factor(
        exponents=factor.exponents[kept[0] * each : (kept[-1] + 1) * each],
        ends={**factor.ends, 0: tuple(min(ends[index], stop) - start for index in kept)},
        added=factor.added,
    )


def rounded(tensor: Tensor, factor: Factor) -> int:
    """How many gains c + w of `tensor` come out other than 2^e (c + w) when they are scaled."""
    if not factor.added:
        return 0
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    wanted = (wide + factor.added) * factors(factor, tensor.shape).to(wide)
    return int((scaled(tensor, factor) + factor.added != wanted).sum())


def with_settings(config: Mapping[str, Any], exponents: Mapping[str, int]) -> dict[str, Any]:
    """The nested `config` with the settings at these dotted keys times powers of two. Integers stay integers."""
    made = {key: with_settings(value, {}) if isinstance(value, Mapping) else value for key, value in config.items()}
    for path, exponent in exponents.items():
        *outer, last = path.split(".")
        inner: dict[str, Any] = made
        for key in outer:
            inner = inner[key]
        inner[last] = type(inner[last])(inner[last] * 2.0**exponent)
    return made
