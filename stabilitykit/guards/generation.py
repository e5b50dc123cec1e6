"""How a row ends: its only choice becomes `<eos>`, in transformers' `generate` and in the kit's own sampler."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stabilitykit.guards.attach import Attached
from stabilitykit.guards.breaks import RowBreak
from stabilitykit.guards.processor import ended, lost, of_scores
from stabilitykit.guards.sequences import Sequences
from stabilitykit.models.gemma.sampler import Sampler
from stabilitykit.recorder.tensors import aside

_LISTS = "_get_logits_processor"  # of transformers' models: makes the processors of one call of generate


@dataclass(slots=True, eq=False)
class Chosen:
    """Scores that logits processors left, on their way to the host: `kinds` [B] as `lost` gives them.

    `raw` are the scores that the processors were given, from which it can be found whose doing it was.
    """

    kinds: Tensor
    ids: Tensor
    raw: Tensor
    processors: Sequence[Any]
    sequences: Sequences
    step: int

    def breaks(self, kinds: Sequence[float]) -> list[RowBreak]:
        """Of rows that no model's output had broken before."""
        sequences = self.sequences
        found = of_scores(kinds, self.ids, self.step)
        return [self._named(one) for one in found if one.row not in sequences.known]

    def _named(self, broke: RowBreak) -> RowBreak:
        with aside():
            ids, scores = self.ids[broke.row : broke.row + 1], self.raw[broke.row : broke.row + 1].clone()
            if bool(lost(scores)[0]):
                return replace(broke, unexamined="the model's own step was not looked at, because of `every`")
            return replace(broke, site=self._whose(ids, scores), unexamined="the model's own scores were finite")

    def _whose(self, ids: Tensor, scores: Tensor) -> str | None:
        """The class of the first processor after which no token can be chosen, each asked again about this row."""
        with aside():
            for processor in self.processors:
                try:
                    scores = processor(ids, scores)
                except Exception:  # one that wants the whole batch
                    return None
                if bool(lost(scores)[0]):
                    return type(processor).__name__
        return None


class Listener(Protocol):
    """A guard, as the processors see it."""

    @property
    def last(self) -> Sequences | None:
        """The sequences of the step that ran last in this thread."""
        ...

    @property
    def ends(self) -> bool:
        """Whether a row that breaks is ended."""
        ...

    def chosen(self, chosen: Chosen) -> None:
        """After the processors. May raise NumericalBreak."""
        ...


class _First:
    """Before a call's own processors."""

    raw: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.raw = scores
        return scores


class _Last:
    """After them: a row that was stopped has one choice left."""

    def __init__(self, guard: Listener, first: _First, own: Sequence[Any], token: int) -> None:
        self._guard, self._first, self._own, self._token = guard, first, own, token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sequences = self._guard.last
        if sequences is None or sequences.rows != scores.shape[0]:
            return scores
        if self._own and self._first.raw is not None:
            kinds = lost(scores)
            self._guard.chosen(
                Chosen(kinds, input_ids, self._first.raw, self._own, sequences, max(sequences.steps - 1, 0))
            )
            if self._guard.ends:  # before the host knows of it: a device asserts where nothing can be drawn
                with aside():
                    only = torch.full_like(scores[:1], -torch.inf)
                    only[:, self._token] = 0.0
                    scores = torch.where((kinds > 0)[:, None], only, scores)
        return ended(scores, sorted(sequences.ended), self._token) if sequences.ended else scores


def in_generate(attached: Attached, model: nn.Module, guard: Listener) -> None:
    """Every call of `generate` gets a processor before its own and one after them; beam search is left alone."""
    for module in list(model.modules()):
        if callable(getattr(type(module), _LISTS, None)):
            attached.attribute(module, _LISTS, _around(getattr(module, _LISTS), guard))


def _around(made: Callable[..., Any], guard: Listener) -> Callable[..., Any]:
    def lists(*args: Any, **kwargs: Any) -> Any:
        found = made(*args, **kwargs)
        config = args[0] if args else kwargs.get("generation_config")
        if (getattr(config, "num_beams", 1) or 1) > 1:
            return found
        own, first = list(found), _First()
        return type(found)([first, *own, _Last(guard, first, own, _ending(config))])

    return lists


def _ending(config: Any) -> int:
    """The token that ends a row, or fills it up where there is none that ends it."""
    eos, pad = getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)
    if isinstance(eos, list | tuple):
        eos = eos[0] if eos else None
    return int(next((one for one in (eos, pad) if one is not None), 0))


def in_own_sampler(attached: Attached, model: nn.Module, guard: Listener) -> None:
    """The kit's own models draw with a module, which is given the scores."""
    eos = int(getattr(model, "eos", 1))

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        last = guard.last
        if last is None or not last.ended or not args or args[0].shape[0] != last.rows:
            return None
        return (ended(args[0], sorted(last.ended), eos), *args[1:]), kwargs

    for module in model.modules():
        if isinstance(module, Sampler):
            attached.before(module, end)
