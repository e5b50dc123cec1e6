"""Which elements depend on which token, found out by disturbing one at a time; what a tracker says is held against it.

The ids of a run are all different, so that disturbing a row of the embedding disturbs one token of one row of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabilitykit.recorder import record
from stabilitykit.recorder.places.labels import NONE, Labels
from stabilitykit.recorder.places.streams import Step
from stabilitykit.recorder.places.track import Tracker, _plain, _written
from stabilitykit.recorder.tensors import aside

LITTLE = 1e-6  # too little to send a token to another expert
SEEN = 1e-13  # what is left of it at least, in float64


@dataclass
class Made:
    """A tensor that an operator made or wrote into, and what is said of it."""

    name: str
    value: Tensor
    labels: Labels
    step: Step

    def claims(self) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
        """Row and absolute position of every element, NONE where there is none."""
        shape, of = self.labels.shape, self.labels
        rows = np.broadcast_to(np.array(NONE) if of.row is None else of.row.values, shape)
        position = np.full(shape, NONE, np.int64)
        if of.position is not None:
            own = of.position.values.astype(np.int64)
            if of.key is not None and of.key_slot == of.slot:
                own = np.maximum(own, of.key.values)
            start = self.step.streams[of.slot].start
            position = np.broadcast_to(np.where(own == NONE, NONE, own + start), shape)
        return rows, position

    def causal(self, row: int, position: int) -> bool:
        """Whether it is claimed that nothing after this position took part, in this row."""
        of = self.labels
        start = self.step.streams[of.slot].start
        if dict(of.bounds).get(of.slot, position - start) > position - start:
            return False
        for number, check in enumerate(self.step.checks):
            if of.checks >> number & 1:
                holds = check.tolist()
                if not (holds[row] if 0 <= row < len(holds) and len(holds) > 1 else all(holds)):
                    return False
        return True


@dataclass
class Run:
    """All that the operators of a run made."""

    made: list[Made] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def listening(run: Run) -> Iterator[None]:
    result = Tracker.result

    def listen(self: Tracker, kind: Any, args: Any, kwargs: Any, output: Any) -> Any:
        found = result(self, kind, args, kwargs, output)
        tensors = _written(kind, args, kwargs) if kind.writes_in_place else _plain(output)
        with aside():
            for tensor in tensors:
                run.made.append(Made(kind.name, tensor.detach().clone(), self.of(tensor), self.step))
        run.failures = self.failures
        return found

    Tracker.result = listen  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tracker.result = result  # type: ignore[method-assign]


def followed(model: nn.Module, call: Callable[[], Any]) -> Run:
    run = Run()
    with torch.no_grad(), listening(run), record(model):
        call()
    assert run.failures == []
    return run


@dataclass
class Report:
    """`wrong` are claims that are not true. Of the elements that depend on some token, `named` have a position, and
    `unnamed` tensors have none. `causal` counts the positions of tensors that were called so.
    """

    wrong: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    named: int = 0
    dependent: int = 0
    causal: int = 0

    @property
    def share(self) -> float:
        return self.named / max(1, self.dependent)


Point = tuple[str, int, int, Tensor]
"""A stream's name, row and position, and the numbers that the element there is made from: of an embedding, a patch."""


def tokens(ids: Tensor, table: Tensor, name: str = "input_ids", start: int = 0) -> list[Point]:
    """The points of ids `[B, L]`, all different, that are looked up in an embedding."""
    return [(name, r, start + p, table[ids[r, p]]) for r in range(len(ids)) for p in range(ids.shape[1])]


def disturbed(
    model: nn.Module, call: Callable[[], Any], points: Sequence[Point], *, little: float = LITTLE, seen: float = SEEN
) -> Report:
    """Runs the model, and again with each of the points disturbed."""
    followed(model, call)  # whatever a model makes once
    plain = followed(model, call)
    report = Report()
    depends: list[dict[tuple[str, int, int], Tensor]] = [{} for _ in plain.made]
    generator = torch.Generator().manual_seed(1)
    for stream, row, position, source in points:
        kept = source.clone()
        with torch.no_grad():
            source += little * torch.randn(kept.shape, generator=generator, dtype=kept.dtype)
        other = followed(model, call)
        with torch.no_grad():
            source.copy_(kept)
        assert [(m.name, m.value.shape) for m in other.made] == [(m.name, m.value.shape) for m in plain.made]
        for found, one, two in zip(depends, plain.made, other.made, strict=True):
            if one.value.is_floating_point():
                found[stream, row, position] = _differ(one.value, two.value, seen)
    for number, (made, found) in enumerate(zip(plain.made, depends, strict=True)):
        if found:
            _judge(number, made, found, report)
    return report


def _differ(one: Tensor, two: Tensor, seen: float) -> Tensor:
    gap = (one.double() - two.double()).abs()
    return (gap > seen * (1 + one.double().abs().nan_to_num(0, 0, 0))) & one.isfinite() & two.isfinite()


def _judge(number: int, made: Made, found: dict[tuple[str, int, int], Tensor], report: Report) -> None:
    rows, positions = made.claims()
    of = made.labels
    some = torch.stack(list(found.values())).any(0).numpy()
    report.dependent += int(some.sum())
    what = f"#{number} {made.name} {tuple(made.value.shape)} in step {made.step.number}"
    if of.blank:
        if some.any() and "empty" not in made.name:  # unwritten memory holds anything
            report.wrong.append(f"{what}: said to depend on nothing")
        return
    if of.position is None:
        report.unnamed.append(what)
        return
    stream = made.step.streams[of.slot]
    report.named += int((some & (positions != NONE)).sum())
    for (name, row, position), changes in found.items():
        changed = changes.numpy()
        if name != stream.name:
            continue
        if of.row is not None:
            strange = changed & (rows != row) & (rows != NONE)
            if strange.any():
                report.wrong.append(f"{what}: row {row} reaches what belongs to row {set(rows[strange].tolist())}")
        own = (positions == position) & ((rows == row) | (rows == NONE))
        if some[own].any() and not changed[own].any() and changed.any():
            report.wrong.append(f"{what}: nothing that belongs to position {position} of row {row} depends on it")
        later = changed & (positions < position) & (positions != NONE)
        for at in set(positions[later].tolist()):
            if made.causal(row, int(at)):
                report.wrong.append(f"{what}: position {position} reaches {at}, which was called causal")
    for at in set(positions[positions != NONE].tolist()):
        report.causal += made.causal(0, int(at))
