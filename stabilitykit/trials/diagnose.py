"""A failure, diagnosed by experiment: run as it is, in wider formats, and with every candidate that fits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from stabilitykit.diagnosis import document, verdict
from stabilitykit.diagnosis.trials import advice, happened
from stabilitykit.errors import MisuseError
from stabilitykit.formats import FORMATS, number_format
from stabilitykit.models.devices import parse_dtype
from stabilitykit.records.scaling import UNCHANGED
from stabilitykit.records.trials import Diagnosis, Harm, Trial
from stabilitykit.run.case import Progress
from stabilitykit.trials.answers import Answers, answers
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.candidates import CANDIDATES
from stabilitykit.trials.candidates.operator import OPERATORS
from stabilitykit.trials.compare import Compared, Row, compare
from stabilitykit.trials.recast import Recast
from stabilitykit.trials.reproduction import Given, Kept, Reproduction, called, dtype_of, same_draws
from stabilitykit.trials.situation import Recorded, Situation, look, recorded

_CLOSE = 2.0  # times as far from float32 as bfloat16 is, a run is still as close as 16 bits come
_LEAST = 2.0**-9  # what rounding alone may come to
_NEAR = 2.0**-6  # where bfloat16 has nothing to compare with
_WORST = 8  # rows


def diagnose(
    model: Any,
    *args: Any,
    dtype: str | None = None,
    reference: nn.Module | None = None,
    matmul: str | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Diagnosis:
    """Runs a model on the input that fails, and tries on that input what may help.

    Args:
        model: a torch.nn.Module, or a bound method of one, such as its `generate`.
        args: what it is called with.
        dtype: the dtype that fails: that of the model, unless it is float32; then float16.
        reference: the original in float32, for a model whose weights were already rounded. Without it the model is
            compared with its own rounded weights, computed in float32, and a note says so.
        matmul: how 16-bit products are summed, as in `record`; as torch does unless given.
        progress: called with (what is being done, how much of it is done, out of how much).
        kwargs: what it is called with, by name.

    Returns:
        A Diagnosis. The model, its buffers, the random numbers that follow and the arguments, a cache among them, stay
        as they are: copies are run.

    Raises:
        MisuseError: for what is not a module or a method of one, and for a model that cannot be copied.
    """
    owner = getattr(model, "__self__", model)
    if not isinstance(owner, nn.Module):
        raise MisuseError(
            "diagnose() expects a torch.nn.Module or a method of one, such as model.generate, got "
            f"{type(model).__name__}."
        )
    given = dtype_of(owner)
    reproduction = Given(
        owner,
        called(owner, "__call__" if owner is model else model.__name__, args, kwargs),
        failing_dtype(dtype, given),
        reference=reference,
        matmul=matmul,
        notes=rounded_note(given, reference),
    )
    return of_reproduction(reproduction, progress=progress)


def diagnose_run(
    model: nn.Module, run: Callable[[nn.Module], Any], *, dtype: str | None = None, grad: bool = False, **how: Any
) -> Diagnosis:
    """As `diagnose`, for whatever `run(model)` does with a model; it must not keep anything between two runs."""
    given = dtype_of(model)
    return of_reproduction(
        Given(model, run, failing_dtype(dtype, given), grad=grad, notes=rounded_note(given, None)), **how
    )


def failing_dtype(dtype: str | None, given: str) -> str:
    if dtype is not None:
        parse_dtype(dtype)
        return dtype
    return "float16" if given == "float32" else given


def rounded_note(given: str, reference: nn.Module | None) -> tuple[str, ...]:
    if given == "float32" or reference is not None:
        return ()
    return (
        f"the model was in {given} already, so float32 computes with weights rounded to {given}; "
        "pass reference= for the original",
    )


def of_reproduction(
    reproduction: Reproduction, *, command: str | None = None, progress: Progress | None = None
) -> Diagnosis:
    """Whatever can be run again, diagnosed. `command` is the command line to name in the result."""
    with same_draws():
        return replace(_Diagnosing(reproduction, progress).run(), command=command)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A candidate that was run: what it gave, compared with float32."""

    candidate: Candidate
    finite: bool
    compared: Compared
    then: str


class _Diagnosing:
    def __init__(self, reproduction: Reproduction, progress: Progress | None) -> None:
        self.reproduction = reproduction
        self.models = Kept(reproduction)
        self.dtype = reproduction.dtype
        self.wide = "float64" if self.dtype in ("float32", "float64") else "float32"
        self.tell = progress or (lambda what, done, total: None)

    def run(self) -> Diagnosis:
        reproduction = self.reproduction
        self.tell(f"recording in {self.dtype}", 0, 1)
        self.model = self.models.model(self.dtype)
        plain = recorded(reproduction, self.model)
        watch = [(one.site, one.broke_at) for one in plain.recording if one.broke_at is not None]
        self.tell(f"recording in {self.wide}", 0, 1)
        wide = self.widest(watch)
        self.reference = wide.answers
        low = compare(plain.answers, wide.answers)
        attempts = [self.attempt(one) for one in self.dtypes()]
        tolerance = self.tolerance(attempts)
        never = {(number, row) for number, one in enumerate(self.reference.outputs) for row in one.lost}
        concerned = low.lost() | {row for row, error in low.error.items() if error > tolerance}
        situation = look(self.models, plain.recording, wide.recording)
        left_out: dict[str, str] = {}
        is_wrong = not plain.answers.finite or bool(concerned)
        if situation.found is not None and is_wrong:
            made, left_out = self.offers(situation)
            self.models.drop("bfloat16")
            for done, one in enumerate(made):
                self.tell(f"trying: {one.name}", done, len(made))
                attempts.append(self.attempt(one))
        trials = [_judged(one, tolerance, concerned, never, self.dtype) for one in attempts]
        is_tried = len(attempts) > len(self.dtypes())  # what is advised was, and what records propose may have failed
        said = verdict(plain.recording, wide.recording, advise=not is_tried)
        found = Diagnosis(
            source=reproduction.source,
            dtype=self.dtype,
            verdict=said,
            advice="",
            finite=plain.answers.finite,
            plain=low.distance(),
            trials=tuple(sorted(trials, key=_order)),
            harm=_harm(situation, low, plain.answers, attempts, tolerance) if plain.answers.finite else None,
            left_out=left_out,
            notes=(*reproduction.notes, *_notes(wide.answers, self.wide)),
            findings=document(plain.recording, wide.recording) | {"verdict": said},
        )
        return replace(found, advice=advice(found))

    def widest(self, watch: Sequence[tuple[str, int]]) -> Recorded:
        """The run that others are compared with: nothing in it is stored in fewer bits."""
        model = self.models.model(self.wide)
        recast = Recast(getattr(torch, self.wide))
        formats = (self.dtype,) if self.dtype in FORMATS else ()
        return recorded(self.reproduction, model, recast=recast, formats=formats, watch=watch)

    def tolerance(self, attempts: Sequence[_Attempt]) -> float:
        """How far from float32 a run may be and still be as close as a 16-bit format comes: some bfloat16's worth.

        Where bfloat16 fails as well, because code casts to something narrower, it is a run without those casts.
        """
        for one in attempts:
            far = one.compared.distance().error_max
            if one.candidate.name == "bfloat16" and not one.finite:
                made = answers(
                    self.reproduction, self.reproduction.model("bfloat16"), recast=Recast(torch.bfloat16)
                )
                far = compare(made, self.reference).distance().error_max if made.finite else None
            if one.candidate.name == "bfloat16" and far is not None:
                return max(_CLOSE * far, _LEAST)
        return _NEAR

    def dtypes(self) -> list[Candidate]:
        """Other dtypes: is it the format at all, and which one is finite?"""
        others = [one for one in ("bfloat16", "float32") if one != self.dtype]
        if self.dtype == "float32":
            others = ["float64"]
        named = self.reproduction.source
        return [
            Candidate(
                name=name,
                summary=f"Everything in {name}.",
                command=f"model.to(torch.{name})" if named is None else f"stabilitykit profile {named} --dtype {name}",
                dtype=name,
                carried=True,
                extra=self.bytes(name),
            )
            for name in others
        ]

    def bytes(self, dtype: str) -> int:
        """Of weights in `dtype`, beyond those of the failing run."""
        bits = number_format(dtype).bits - number_format(self.dtype).bits
        return max(0, sum(one.numel() for one in self.model.parameters() if one.is_floating_point()) * bits // 8)

    def offers(self, situation: Situation) -> tuple[list[Candidate], dict[str, str]]:
        made: dict[str, Candidate] = {}
        left_out: dict[str, str] = {}
        for number, offer in enumerate(CANDIDATES):
            self.tell("looking for candidates", number, len(CANDIDATES))
            for one in offer(situation):
                if isinstance(one, Candidate):
                    made.setdefault(one.name, one)
                else:
                    left_out[one.name] = one.why
        return list(made.values()), {name: why for name, why in left_out.items() if name not in made}

    def recast(self, dtype: str) -> Recast | None:
        """What code itself asks for, in `dtype` instead of the failing one; all of it, where everything is wider."""
        if dtype == self.dtype:
            return None
        source = None if dtype == self.wide else getattr(torch, self.dtype)
        return Recast(getattr(torch, dtype), source)

    def attempt(self, candidate: Candidate) -> _Attempt:
        models = self.models if candidate.instead is None else Kept(candidate.instead)
        reproduction, reference = models.of, self.reference
        dtype = candidate.dtype or self.dtype
        try:
            if candidate.instead is not None or candidate.reference is not None:
                wide = models.model(self.wide)
                same = None if candidate.reference is None else candidate.reference(wide)
                reference = answers(reproduction, wide, around=same, recast=Recast(getattr(torch, self.wide)))
            is_plain = candidate.scaling == UNCHANGED
            model = models.model(dtype) if is_plain else models.scaled(dtype, candidate.scaling)
            recast = self.recast(dtype)
            made = answers(reproduction, model, around=candidate.around(model), recast=recast)
        except MisuseError as error:
            made, model = Answers(error=str(error)), self.model
        compared = compare(made, reference)
        then = ""
        if made.error is not None:
            then = made.error
        if not made.finite:
            again = recorded(reproduction, model, around=candidate.around(model), recast=self.recast(dtype))
            then = happened(again.recording, then)
        return _Attempt(candidate, made.finite, compared, then)


def _judged(one: _Attempt, tolerance: float, concerned: set[Row], never: set[Row], dtype: str) -> Trial:
    """`never` are the rows that float32 loses: with a change that it needs too, any finite number will do there."""
    candidate, distance = one.candidate, one.compared.distance()
    wanted = one.compared.distance(one.compared.error.keys() - never) if candidate.reference else distance
    is_close = wanted.compared == wanted.rows and (wanted.error_max or 0.0) <= tolerance
    return Trial(
        name=candidate.name,
        summary=candidate.summary,
        dtype=candidate.dtype or dtype,
        finite=one.finite,
        cured=one.finite and (is_close or (candidate.instead is not None and distance.rows == 0)),
        distance=distance,
        concerned=one.compared.distance(concerned) if candidate.instead is None else None,
        then=one.then,
        memory=candidate.extra,
        carried=candidate.carried,
        command=candidate.command,
    )


def _order(trial: Trial) -> tuple[bool, bool, bool, bool, float]:
    """What cures comes first; of that changes within the dtype, those first that a folder can carry, before other
    dtypes; then by the distance from float32.
    """
    return (not trial.cured, trial.is_format, not trial.carried, not trial.finite, trial.far)


def _harm(
    situation: Situation, low: Compared, plain: Answers, attempts: Sequence[_Attempt], tolerance: float
) -> Harm | None:
    """What an overflow that ended on the way did to what is returned; None where nothing overflowed."""
    if situation.found is None:
        return None
    worst = sorted(low.error.items(), key=lambda one: -one[1])[:_WORST]
    without = next((one for one in attempts if one.candidate.name in OPERATORS), None)
    far = low.distance().error_max or 0.0
    rest = None if without is None else without.compared.distance()
    is_cause = rest is None or (rest.error_max is not None and rest.error_max < far / 2)
    rows = tuple((number, *plain.outputs[number].place(row), error) for (number, row), error in worst)
    return Harm(
        site=situation.found.broke.site,
        harmful=far > tolerance and is_cause,
        plain=low.distance(),
        without=rest,
        rows=rows,
    )


def _notes(wide: Answers, dtype: str) -> tuple[str, ...]:
    if not wide.recast:
        return ()
    return (
        f"the code itself asks for narrower formats than {dtype}; for comparison {wide.recast:,} operators ran in it",
    )
