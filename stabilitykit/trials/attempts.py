"""Candidates, each run once on one input and compared with what a wider format gives there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from stabilitykit.diagnosis.trials import happened
from stabilitykit.errors import MisuseError
from stabilitykit.records.scaling import UNCHANGED
from stabilitykit.trials.answers import Answers, answers
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.compare import Compared, compare
from stabilitykit.trials.recast import Precision, Recast
from stabilitykit.trials.reproduction import Kept, copied, same_draws
from stabilitykit.trials.situation import Recorded, recorded

_CLOSE = 2.0  # times as far from float32 as bfloat16 is, a run is still as close as 16 bits come
_LEAST = 2.0**-9  # what rounding alone may come to
_NEAR = 2.0**-6  # where bfloat16 has nothing to compare with
_FAR = 0.5  # of the largest number: too far for rounding, unless it is rounding alone


@dataclass(frozen=True, slots=True)
class Attempt:
    """A candidate that was run: what it gave, compared with the reference. `then` says what broke, or was raised."""

    candidate: Candidate
    finite: bool
    compared: Compared
    then: str


class Attempts:
    """On the input of `models`; `reference` is what `wide` gives there."""

    def __init__(self, models: Kept, wide: str, reference: Answers) -> None:
        self._models = models
        self._wide = wide
        self._reference = reference
        self._made: dict[str, Attempt] = {}

    def attempt(self, candidate: Candidate) -> Attempt:
        """Runs it, unless one of its name was; where something is not finite again with records, to say what broke."""
        if candidate.name not in self._made:
            with same_draws():  # models that are made for it draw weights
                self._made[candidate.name] = self._attempt(candidate)
        return self._made[candidate.name]

    def of_wide(self, candidate: Candidate, wide: Recorded) -> Attempt:
        """That of the format which gave the reference: it ran already."""
        made = wide.answers
        then = "" if made.finite else happened(wide.recording, made.error or "")
        self._made[candidate.name] = Attempt(candidate, made.finite, compare(made, made), then)
        return self._made[candidate.name]

    def bare(self, candidate: Candidate) -> Attempt:
        """Runs it, without records."""
        return self._tried(candidate)[0]

    def tolerance(self, attempts: Sequence[Attempt]) -> float:
        """How far from float32 a run may be and still be as close as a 16-bit format comes: some bfloat16's worth.

        Where bfloat16 is far off as well, because code casts to something narrower, those casts round, and do not
        overflow.
        """
        for one in attempts:
            if one.candidate.name != "bfloat16":
                continue
            far = one.compared.distance().error_max
            if not one.finite or far is None or far > _FAR:
                rounding_only = Recast(torch.bfloat16, rounds=True)
                made = answers(self._models.of, self._models.model("bfloat16"), recast=rounding_only)
                rounded = compare(made, self._reference).distance().error_max if made.finite else None
                far = min((x for x in (rounded, far if one.finite else None) if x is not None), default=None)
            if far is not None:
                return max(_CLOSE * far, _LEAST)
        return _NEAR

    def rounding(self) -> float:
        """The same, measured: how far runs with the failing format's precision and the wider one's range are.

        bfloat16 may be close by chance, where a tie or a choice between experts magnifies rounding. One run may be so,
        too: results are rounded to the nearest, down, and up.
        """
        of, failing = self._models.of, getattr(torch, self._models.of.dtype)
        wide = copied(self._models.model(of.dtype), self._wide)  # its weights are rounded
        found = [0.0]
        for way in (torch.round, torch.floor, torch.ceil):
            recast = Recast(getattr(torch, self._wide))
            made = answers(of, wide, around=Precision(failing, way), recast=recast)
            far = compare(made, self._reference).distance().error_max
            if made.finite and far is not None:
                found.append(far)
        return _CLOSE * max(found)

    def _attempt(self, candidate: Candidate) -> Attempt:
        made, models, model = self._tried(candidate)
        if made.finite or model is None:
            return made
        # All of the run: what breaks first may end on the way, and only what follows shows that it did.
        again = recorded(models.of, model, around=candidate.around(model), recast=self._recast(candidate))
        return replace(made, then=happened(again.recording, made.then))

    def _tried(self, candidate: Candidate) -> tuple[Attempt, Kept, nn.Module | None]:
        """What came of it, and what was run: no model, where it cannot be."""
        models, reference = self._models, self._reference
        if candidate.instead is not None:
            models = Kept(candidate.instead)
        try:
            if candidate.instead is not None or candidate.reference is not None:
                wide = models.model(self._wide)
                same = None if candidate.reference is None else candidate.reference(wide)
                reference = answers(models.of, wide, around=same, recast=Recast(getattr(torch, self._wide)))
            dtype = self._dtype(candidate)
            is_plain = candidate.scaling == UNCHANGED
            model = models.model(dtype) if is_plain else models.scaled(dtype, candidate.scaling)
            made = answers(models.of, model, around=candidate.around(model), recast=self._recast(candidate))
        except MisuseError as error:
            return Attempt(candidate, False, compare(Answers(), reference), str(error)), models, None
        return Attempt(candidate, made.finite, compare(made, reference), made.error or ""), models, model

    def _dtype(self, candidate: Candidate) -> str:
        return candidate.dtype or self._models.of.dtype

    def _recast(self, candidate: Candidate) -> Recast | None:
        """What code itself asks for, in the candidate's dtype instead of the failing one; all, where that is wider."""
        dtype, failing = self._dtype(candidate), self._models.of.dtype
        if dtype == failing:
            return None
        source = None if dtype == self._wide else getattr(torch, failing)
        return Recast(getattr(torch, dtype), source)
