"""Casts to a narrower format that stay in its range: by clamping first, or by a power of two that is undone later."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.models.operators import Traits, narrows
from stabilitykit.remedies.remedy import LeftOut
from stabilitykit.trials.answers import answers
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import Situation, without_layers
from stabilitykit.trials.surgery import inside
from stabilitykit.words import number

SATURATING = "saturating cast"
RESCALED = "rescaled cache"


def casts(situation: Situation) -> Iterator[Candidate | LeftOut]:
    """Where a cast overflows the format that it is to."""
    broke = situation.broke
    if broke is None or broke.operator != "cast" or situation.kind != "overflow":
        return
    target: Any = getattr(torch, broke.dtype, None)
    if not isinstance(target, torch.dtype):
        return
    there = _Casts(without_layers(broke.module), target)
    where, limit = broke.module or "the model", torch.finfo(target).max
    yield Candidate(
        name=SATURATING,
        lossy=True,
        summary=f"Clamps to ±{number(limit)} before the cast to {broke.dtype}; what exceeds it is lost.",
        command=f"# in {where}: x.clamp(-{limit:g}, {limit:g}).to(torch.{broke.dtype})",
        around=there.saturated,
    )
    if situation.part == "cache":
        yield _rescaled(situation, there)


def _rescaled(situation: Situation, there: "_Casts") -> Candidate | LeftOut:
    dtype = str(there.target).removeprefix("torch.")
    seen = _Seen()
    answers(situation.reproduction, situation.model, around=there.watched(seen, situation.model))
    if not seen.read:
        return LeftOut(RESCALED, f"What is cast to {dtype} is never cast back, so nothing would undo a factor.")
    k = max(1, 1 + math.ceil(math.log2(seen.largest / torch.finfo(there.target).max)))
    where = there.pattern or "the model"
    return Candidate(
        name=RESCALED,
        lossy=True,
        summary=f"Multiplies by 2^-{k} what is cast to {dtype}, and by 2^{k} what is read back: keys and values keep "
        "their precision.",
        command=f"# in {where}: (x * 2.0**-{k}).to(torch.{dtype}), and .to(x.dtype) * 2.0**{k} where it is read",
        around=partial(there.rescaled, k),
    )


@dataclass(slots=True)
class _Seen:
    """The `largest` finite magnitude that was cast to the narrow format, and how often it was `read` back."""

    largest: float = 1.0
    read: int = 0


@dataclass(frozen=True, slots=True)
class _Casts:
    """The casts to `target`, and back from it, in modules called by `pattern`, with a star for each layer's number."""

    pattern: str
    target: torch.dtype

    def saturated(self, model: nn.Module) -> AbstractContextManager[None]:
        limit = torch.finfo(self.target).max

        def operate(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            source = self._written(kind, args, kwargs)
            if source is None:
                return kind.func(*args, **kwargs)
            return _with(kind, args, kwargs, source, source.clamp(-limit, limit))

        return inside(model, self._chosen, operate)

    def rescaled(self, k: int, model: nn.Module) -> AbstractContextManager[None]:
        def operate(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            source = self._written(kind, args, kwargs)
            if source is not None:
                return _with(kind, args, kwargs, source, source * 2.0**-k)
            output = kind.func(*args, **kwargs)
            if not self._reads(kind, args, output):
                return output
            limit = torch.finfo(output.dtype).max  # which the narrow format may have rounded up to
            return output.copy_((output.float() * 2.0**k).clamp(-limit, limit))

        return inside(model, self._chosen, operate)

    def watched(self, seen: _Seen, model: nn.Module) -> AbstractContextManager[None]:
        def operate(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            source = self._written(kind, args, kwargs)
            if source is not None:
                held = source[source.isfinite()]
                seen.largest = max(seen.largest, float(held.abs().max()) if held.numel() else 0.0)
            output = kind.func(*args, **kwargs)
            seen.read += self._reads(kind, args, output)
            return output

        return inside(model, self._chosen, operate)

    def _chosen(self, path: str) -> bool:
        return without_layers(path) == self.pattern

    def _written(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What an operator casts to the target, None for any other operator."""
        if kind.name != "cast" or not args:
            return None
        source: Any = args[0]
        to = kwargs.get("dtype")
        if kind.writes_in_place:
            source, to = args[1], source.dtype
        if not isinstance(source, Tensor) or not source.is_floating_point() or to != self.target:
            return None
        return source if narrows(source.dtype, self.target) else None

    def _reads(self, kind: Traits, args: tuple[Any, ...], output: Any) -> bool:
        """Whether an operator casts from the target to a wider format."""
        if kind.name != "cast" or kind.writes_in_place or not isinstance(output, Tensor):
            return False
        return args[0].dtype == self.target and output.is_floating_point() and narrows(output.dtype, self.target)


def _with(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any], source: Tensor, other: Tensor) -> Any:
    return kind.func(*(other if one is source else one for one in args), **kwargs)
