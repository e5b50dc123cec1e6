"""How a row ends: its only choice becomes `<eos>`, in transformers' `generate` and in the kit's own sampler."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import wraps
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
_COMPILES = "get_compiled_call"  # of transformers' models: the compiled call that generate decodes with, on a device


@dataclass(slots=True, eq=False)
class Chosen:
    """Scores that logits processors left, on their way to the host: `kinds` [B] as `lost` gives them.

    `stages` are the same of the scores as they came, None by name, and after each processor, by the name of its class.
    """

    kinds: Tensor
    ids: Tensor
    stages: Sequence[tuple[str | None, Tensor]]
    sequences: Sequences
    step: int
    fed: int

    def breaks(self, kinds: Sequence[float]) -> list[RowBreak]:
        """Of rows that no model's output had broken before."""
        sequences = self.sequences
        found = of_scores(kinds, self.ids, self.step)
        return [self._named(one) for one in found if one.row not in sequences.known]

    def _named(self, broke: RowBreak) -> RowBreak:
        if self.ids.shape[1] < self.fed:  # the prompt came as embeddings, of which there is no id
            broke = replace(broke, position=self.fed - 1)
        with aside():
            names = [name for name, kinds in self.stages if bool(kinds[broke.row])]
        if names and names[0] is None:
            return replace(broke, unexamined="the model's own step was not looked at, because of `every`")
        return replace(broke, site=names[0] if names else None, unexamined="the model's own scores were finite")


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

    def generating(self) -> AbstractContextManager[None]:
        """Around a call of `generate`."""
        ...

    def beams(self, count: int) -> None:
        """So many hypotheses a prompt has in the call that is running."""
        ...

    def outside(self, path: str, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which runs `module` compiled, watched from outside."""
        ...

    def chosen(self, chosen: Chosen) -> None:
        """After the processors. May raise NumericalBreak."""
        ...


class _Look:
    """Before a call's own processors, and after each of them: one may keep a state, or write into what it is given, so
    that none can be asked again.
    """

    def __init__(self, name: str | None, stages: list[tuple[str | None, Tensor]]) -> None:
        self._name, self._stages = name, stages

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._name is None:
            self._stages.clear()
        self._stages.append((self._name, lost(scores)))
        return scores


class _Last:
    """After them: a row that was stopped has one choice left."""

    def __init__(self, guard: Listener, stages: Sequence[tuple[str | None, Tensor]], token: int) -> None:
        self._guard, self._stages, self._token = guard, stages, token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sequences = self._guard.last
        if sequences is None or sequences.rows != scores.shape[0]:
            return scores
        if len(self._stages) > 1:
            kinds = self._stages[-1][1]
            step = max(sequences.steps - 1, 0)
            self._guard.chosen(Chosen(kinds, input_ids, tuple(self._stages), sequences, step, sequences.fed))
            if self._guard.ends:  # before the host knows of it: a device asserts where nothing can be drawn
                with aside():
                    only = torch.full_like(scores[:1], -torch.inf)
                    only[:, self._token] = 0.0
                    scores = torch.where((kinds > 0)[:, None], only, scores)
        return ended(scores, sorted(sequences.ended), self._token) if sequences.ended else scores


def in_generate(attached: Attached, model: nn.Module, guard: Listener) -> None:
    """Every call of `generate` gets processors around its own; of beam search only the number of beams is told.

    What `generate` compiles for itself is watched from outside.
    """
    for path, module in list(model.named_modules()):
        if callable(getattr(type(module), _LISTS, None)):
            attached.method(module, _LISTS, _around(getattr(module, _LISTS), guard))
            attached.method(module, "generate", _within(module.generate, guard))
            if callable(getattr(type(module), _COMPILES, None)):
                attached.method(module, _COMPILES, _compiled(path, module, getattr(module, _COMPILES), guard))


def _within(generate: Any, guard: Listener) -> Any:
    @wraps(generate)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with guard.generating():
            return generate(*args, **kwargs)

    return watched


def _compiled(path: str, module: nn.Module, made: Callable[..., Any], guard: Listener) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return guard.outside(path, module, made(*args, **kwargs))

    return call


def _around(made: Callable[..., Any], guard: Listener) -> Callable[..., Any]:
    def lists(*args: Any, **kwargs: Any) -> Any:
        found = made(*args, **kwargs)
        config = args[0] if args else kwargs.get("generation_config")
        beams = getattr(config, "num_beams", 1) or 1
        guard.beams(beams)
        if beams > 1:
            return found
        stages: list[tuple[str | None, Tensor]] = []
        own = [one for processor in found for one in (processor, _Look(type(processor).__name__, stages))]
        return type(found)([*([_Look(None, stages)] if own else []), *own, _Last(guard, stages, _ending(config))])

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
