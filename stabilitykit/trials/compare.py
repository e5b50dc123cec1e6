"""How far what a run gives is from what float32 gives."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.records.trials import CLOSER, Distance
from stabilitykit.remedies.nearness import Probabilities, nearness
from stabilitykit.trials.answers import Answers, Output

Row = tuple[int, int]
"""The number of an output, and that of a row in it."""


@dataclass(frozen=True, slots=True)
class Compared:
    """By row: `error`, in parts of the reference's largest magnitude, infinite where it is lost; `kl` in nats and
    whether the most likely token is the `same`, of logits that are finite in both.
    """

    error: Mapping[Row, float]
    kl: Mapping[Row, float]
    same: Mapping[Row, bool]

    def distance(self, only: Set[Row] | None = None) -> Distance:
        rows = [row for row in self.error if only is None or row in only]
        errors = [self.error[row] for row in rows if self.error[row] != float("inf")]
        kl = [self.kl[row] for row in rows if row in self.kl]
        same = [self.same[row] for row in rows if row in self.same]
        return Distance(
            rows=len(rows),
            compared=len(errors),
            error_mean=sum(errors) / len(errors) if errors else None,
            error_max=max(errors, default=None),
            kl_mean=sum(kl) / len(kl) if kl else None,
            kl_max=max(kl, default=None),
            top1=sum(same) / len(same) if same else None,
        )

    def farther_than(self, other: "Compared") -> set[Row]:
        """The rows of outputs in which this is on average, or at most, more than `CLOSER` times as far as another run.

        What another run has lost, or has not at all, is none of them.
        """
        found: set[Row] = set()
        for number in {number for number, _ in self.error}:
            rows = {row for row in self.error if row[0] == number}
            if self.distance(rows).is_farther(other.distance(rows)):
                found |= {row for row in rows if self.error[row] > CLOSER * other.error.get(row, 0.0)} or rows
        return found

    def lost(self) -> set[Row]:
        return {row for row, error in self.error.items() if error == float("inf")}


def compare(ours: Answers, theirs: Answers) -> Compared:
    """Every row that both have, call by call, as long as the calls were given the same tokens.

    Rows that are not finite in `theirs` count only where they are something else in `ours`.
    """
    error: dict[Row, float] = {}
    kl: dict[Row, float] = {}
    same: dict[Row, bool] = {}
    for number, (one, other) in enumerate(pairs(ours, theirs)):
        a, b = one.values.float(), other.values.float()
        places = other.rows.tolist()
        away = torch.where(a == b, torch.zeros((), device=a.device), (a - b).abs())
        both = a.isnan() & b.isnan()
        away = away.masked_fill(both, 0)
        held = b[b.isfinite()]
        largest = float(held.abs().max()) if held.numel() else 0.0
        far = away.amax(-1) if away.shape[-1] else torch.zeros(len(away))
        relative = far / largest if largest else torch.where(far > 0, torch.inf, 0.0).to(far)
        relative = torch.where(relative.isnan(), torch.inf, relative)
        error |= {(number, place): value for place, value in zip(places, relative.tolist(), strict=True)}
        if other.logits:
            fine = a.isfinite().all(-1) & b.isfinite().all(-1)
            kept = fine.nonzero()[:, 0]
            if len(kept):
                near = nearness(a[kept], Probabilities.of(b[kept]))
                names = [(number, places[index]) for index in kept.tolist()]
                kl |= dict(zip(names, near.kl.tolist(), strict=True))
                same |= dict(zip(names, near.same.tolist(), strict=True))
    return Compared(error, kl, same)


def pairs(ours: Answers, theirs: Answers) -> Iterator[tuple[Output, Output]]:
    """The outputs of both, call by call, as long as the calls were given the same integers and returned as much."""
    for one, given, other, expected in zip(ours.outputs, ours.given, theirs.outputs, theirs.given, strict=False):
        alike = len(given) == len(expected) and all(map(_equal, given, expected))
        if not alike or one.shape != other.shape:
            return
        yield one, other


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())
