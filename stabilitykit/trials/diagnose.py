"""A failure, diagnosed by experiment: run as it is, in wider formats, and with every candidate that fits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from stabilitykit.diagnosis import document, verdict
from stabilitykit.diagnosis.outcome import Outcome, decisive
from stabilitykit.diagnosis.trials import advice, happened
from stabilitykit.errors import MisuseError
from stabilitykit.formats import FORMATS
from stabilitykit.models.devices import parse_dtype
from stabilitykit.recorder.names import site_path
from stabilitykit.recorder.weights import check_weights
from stabilitykit.records import Recording
from stabilitykit.records.scaling import UNCHANGED
from stabilitykit.records.trials import Diagnosis, Rounding, Smallest, Trial
from stabilitykit.run.case import Progress
from stabilitykit.trials.answers import Answers, answers
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.candidates import CANDIDATES
from stabilitykit.trials.columns import given_call
from stabilitykit.trials.compare import Compared, Row, compare
from stabilitykit.trials.harm import CLOSER, harm, harmed, without_overflow
from stabilitykit.trials.minimise import has_tokens, minimise
from stabilitykit.trials.recast import Recast
from stabilitykit.trials.reproduction import Given, Kept, Reproduction, copied, dtype_of, same_draws
from stabilitykit.trials.rounding import CLOSE, rounding
from stabilitykit.trials.situation import Recorded, Situation, look, recorded
from stabilitykit.trials.stored import wide_like
from stabilitykit.words import counted

_CLOSE = 2.0  # times as far from float32 as bfloat16 is, a run is still as close as 16 bits come
_LEAST = 2.0**-9  # what rounding alone may come to
_NEAR = 2.0**-6  # where bfloat16 has nothing to compare with


def diagnose(
    model: Any,
    *args: Any,
    dtype: str | None = None,
    reference: nn.Module | None = None,
    matmul: str | None = None,
    minimise: bool = False,
    compiled: bool = False,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Diagnosis:
    """Runs a model on the input that fails, and tries on that input what may help.

    Args:
        model: a torch.nn.Module, or a bound method of one, such as its `generate`.
        args: what it is called with.
        dtype: the dtype that fails: that of the model, unless it is float32 and does not fail in it; then float16.
        reference: the original in float32, for a model whose weights were already rounded. Without it the model is
            compared with its own rounded weights, computed in float32, and a note says so.
        matmul: how 16-bit products are summed, as in `record`; as torch does unless given.
        minimise: also look for the smallest part of the input that fails alike, among rows and tokens of `input_ids`,
            or of whatever argument holds token ids; masks, positions and what else has a column for each are cut with
            them.
        compiled: compare a run that stays in range with one through torch.compile, too, which takes a minute or so.
        progress: called with (what is being done, how much of it is done, out of how much).
        kwargs: what it is called with, by name.

    Returns:
        A Diagnosis. The model, its buffers, the random numbers that follow and the arguments, a cache among them, stay
        as they are: copies are run.

    Raises:
        MisuseError: for what is not a module or a method of one, for a model that cannot be copied, and with
            `minimise` for arguments without token ids.
    """
    owner = getattr(model, "__self__", model)
    if not isinstance(owner, nn.Module):
        raise MisuseError(
            "diagnose() expects a torch.nn.Module or a method of one, such as model.generate, got "
            f"{type(model).__name__}."
        )
    given = dtype_of(owner, (args, kwargs))
    method = "__call__" if owner is model else model.__name__
    reproduction = given_call(
        owner,
        method,
        args,
        kwargs,
        dtype=failing_dtype(dtype, given),
        reference=reference,
        matmul=matmul,
        notes=rounded_note(owner, given, reference),
    )
    return of_reproduction(
        _where_it_fails(reproduction, dtype, given), minimise=minimise, compiled=compiled, progress=progress
    )


def diagnose_run(
    model: nn.Module, run: Callable[[nn.Module], Any], *, dtype: str | None = None, grad: bool = False, **how: Any
) -> Diagnosis:
    """As `diagnose`, for whatever `run(model)` does with a model; it must not keep anything between two runs."""
    given = dtype_of(model)
    reproduction = Given(model, run, failing_dtype(dtype, given), grad=grad, notes=rounded_note(model, given, None))
    return of_reproduction(_where_it_fails(reproduction, dtype, given), **how)


def _where_it_fails(reproduction: Given, asked: str | None, given: str) -> Given:
    """A model that is float32 may fail as it is, if no other dtype is asked for: in float32, or in what the run itself
    casts to, as autocasting does.
    """
    if given != "float32" or asked not in (None, given):
        return reproduction
    model = copied(reproduction.given, given)
    made = answers(reproduction, model, recast=Recast(torch.float32))
    broke = decisive(recorded(reproduction, model).recording) if made.recast else None
    if broke is not None and broke.broke.dtype != given:
        return replace(reproduction, dtype=broke.broke.dtype, casts=True, notes=(*reproduction.notes, _casts(broke)))
    return reproduction if asked is not None or made.finite else replace(reproduction, dtype=given)


def _casts(found: Outcome) -> str:
    return (
        f"the weights are float32, and it is the run that casts to {found.broke.dtype}: torch.autocast, or code of its "
        "own; other dtypes are tried in that place"
    )


def failing_dtype(dtype: str | None, given: str) -> str:
    if dtype is not None:
        parse_dtype(dtype)
        return dtype
    return "float16" if given == "float32" else given


def rounded_note(model: nn.Module, given: str, reference: nn.Module | None) -> tuple[str, ...]:
    if given == "float32" or reference is not None or not any(one.is_floating_point() for one in model.parameters()):
        return ()
    return (
        f"the model was in {given} already, so float32 computes with weights rounded to {given}; "
        "pass reference= for the original",
    )


def of_reproduction(
    reproduction: Reproduction,
    *,
    minimise: bool = False,
    compiled: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Whatever can be run again, diagnosed. `command` is the command line to name in the result.

    Raises MisuseError where it is to `minimise` what has no tokens.
    """
    with same_draws():
        return replace(_Diagnosing(reproduction, progress, minimise, compiled).run(), command=command)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A candidate that was run: what it gave, compared with float32."""

    candidate: Candidate
    finite: bool
    compared: Compared
    then: str


class _Diagnosing:
    def __init__(self, reproduction: Reproduction, progress: Progress | None, minimise: bool, compiled: bool) -> None:
        self.compiled = compiled
        self.reproduction = reproduction
        self.minimised = reproduction if minimise and has_tokens(reproduction) else None
        if minimise and self.minimised is None:
            raise MisuseError(
                "Only an input with tokens can be made smaller: prompts, or token ids [rows, columns] among a call's "
                "arguments, such as input_ids. This one has none; leave minimise out."
            )
        self.models = Kept(reproduction)
        self.dtype = reproduction.dtype
        self.wide = "float64" if self.dtype in ("float32", "float64") else "float32"
        self.tried: dict[str, _Attempt] = {}
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
        self.find_weights(plain.recording)
        situation = look(self.models, plain.recording, wide)
        without, rows = None, set[Row]()
        if plain.answers.finite and situation.found is not None:
            self.tell("measuring the harm", 0, 1)
            without = without_overflow(situation, lambda one: self.attempt(one).compared)
            rows = harmed(situation, low, without, tolerance)
        left_out: dict[str, str] = {}
        is_wrong = not plain.answers.finite or bool(concerned or rows)
        if situation.found is not None and is_wrong:
            made, left_out = self.offers(situation)
            self.models.drop("bfloat16")
            for done, one in enumerate(made):
                self.tell(f"trying: {one.name}", done, len(made))
                attempts.append(self.attempt(one))
        rounded, unrounded = tuple[Rounding, ...](), tuple[str, ...]()
        is_close = (low.distance().error_max or 0.0) <= CLOSE
        if not is_wrong and is_close and not reproduction.grad:
            self.tell("comparing ways to run it", 0, 1)
            rounded, unrounded = rounding(self.models, self.models.model(self.wide), compiled=self.compiled)
        within = without if rows and not concerned else None  # as close as bfloat16, and wrong for all that
        trials = [_judged(one, tolerance, concerned | rows, never, self.dtype, within) for one in attempts]
        is_tried = any(not trial.is_format for trial in trials)  # and what records propose may have failed
        made_worse = harm(situation, low, plain.answers, without, rows) if plain.answers.finite else None
        said = verdict(
            plain.recording,
            wide.recording,
            advise=not is_tried and (made_worse is None or made_worse.harmful),
            command="",  # this is it
            harmful=None if made_worse is None else made_worse.harmful,
        )
        found = Diagnosis(
            source=reproduction.source,
            dtype=self.dtype,
            verdict=said,
            advice="",
            finite=plain.answers.finite,
            plain=low.distance(),
            trials=tuple(sorted(trials, key=_order)),
            harm=made_worse,
            smallest=self.smallest(plain.recording),
            rounding=rounded,
            left_out=left_out,
            notes=(*reproduction.notes, *_notes(wide.answers, self.wide), *unrounded),
            findings=document(plain.recording, wide.recording) | {"verdict": said},
        )
        return replace(found, advice=advice(found))

    def smallest(self, recording: Recording) -> Smallest | None:
        if self.minimised is None:
            return None
        return minimise(self.minimised, model=self.model, recording=recording, progress=self.tell)

    def find_weights(self, recording: Recording) -> None:
        """Tells the records of a run in which a weight is not finite what that weight is in float32."""
        broken = [one for one in recording if one.broke is not None and one.broke.kind == "weight"]
        if not broken or recording.header.weights is not None:
            return
        wide = wide_like(self.models, self.model, self.wide)
        names = [name for name, one in self.model.named_parameters() if not one.isfinite().all()]
        if all(bool(wide.get_parameter(name).isfinite().all()) for name in names):
            found = check_weights(
                ((site_path(name), wide.get_parameter(name).detach()) for name in names), (self.dtype,)
            )
            recording.header = replace(recording.header, weights=found[self.dtype])

    def widest(self, watch: Sequence[tuple[str, int]]) -> Recorded:
        """The run that others are compared with: nothing in it is stored in fewer bits."""
        model = self.models.model(self.wide)
        recast = Recast(getattr(torch, self.wide))
        formats = (self.dtype,) if self.dtype in FORMATS else ()
        return recorded(self.reproduction, model, recast=recast, formats=formats, watch=watch)

    def tolerance(self, attempts: Sequence[_Attempt]) -> float:
        """How far from float32 a run may be and still be as close as a 16-bit format comes: some bfloat16's worth.

        Where bfloat16 fails as well, because code casts to something narrower, those casts round, and do not overflow.
        """
        for one in attempts:
            far = one.compared.distance().error_max
            if one.candidate.name == "bfloat16" and not one.finite:
                rounding_only = Recast(torch.bfloat16, rounds=True)
                made = answers(self.reproduction, self.models.model("bfloat16"), recast=rounding_only)
                far = compare(made, self.reference).distance().error_max if made.finite else None
            if one.candidate.name == "bfloat16" and far is not None:
                return max(_CLOSE * far, _LEAST)
        return _NEAR

    def dtypes(self) -> list[Candidate]:
        """Other dtypes: is it the format at all, and which one is finite?"""
        others = [one for one in ("bfloat16", "float32") if one != self.dtype]
        if self.dtype == "float32":
            others = ["float64"]
        elif self.dtype.startswith("float8"):  # what is bfloat16 casts to it all the same
            others = ["float32"]
        return [
            Candidate(
                name=name,
                summary=f"Everything in {name}.",
                command=self.reproduction.in_dtype(name),
                dtype=name,
                carried=True,
                extra=self.bytes(name),
            )
            for name in others
        ]

    def bytes(self, dtype: str) -> int:
        """Of weights in `dtype`, beyond those of the failing run."""
        return max(0, _bytes(self.models.model(dtype)) - _bytes(self.model))

    def offers(self, situation: Situation) -> tuple[list[Candidate], dict[str, str]]:
        made: dict[str, Candidate] = {}
        left_out: dict[str, str] = {}
        for number, offer in enumerate(CANDIDATES):
            self.tell("looking for candidates", number, len(CANDIDATES))
            with same_draws():  # models that are built to look at draw weights
                offered = list(offer(situation))
            for one in offered:
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
        if candidate.name not in self.tried:
            with same_draws():  # as above
                self.tried[candidate.name] = self._attempt(candidate)
        return self.tried[candidate.name]

    def _attempt(self, candidate: Candidate) -> _Attempt:
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
        then = made.error or ""
        if not made.finite:
            again = recorded(reproduction, model, around=candidate.around(model), recast=self.recast(dtype))
            then = happened(again.recording, then)
        return _Attempt(candidate, made.finite, compared, then)


def _bytes(model: nn.Module) -> int:
    return sum(one.nbytes for one in model.parameters() if one.is_floating_point())


def _judged(
    one: _Attempt, tolerance: float, concerned: set[Row], never: set[Row], dtype: str, within: Compared | None
) -> Trial:
    """Whether it is as close to float32 as 16 bits come, and a change within the dtype as close as `within`, too.

    `never` are the rows that float32 loses: with a change that it needs too, any finite number will do there.
    """
    candidate, distance = one.candidate, one.compared.distance()
    wanted = one.compared.distance(one.compared.error.keys() - never) if candidate.reference else distance
    is_close = distance.rows > 0 and wanted.compared == wanted.rows and (wanted.error_max or 0.0) <= tolerance
    if within is not None and candidate.dtype in (None, dtype):
        is_close = is_close and not one.compared.farther_than(within, CLOSER)
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


def _notes(wide: Answers, dtype: str) -> tuple[str, ...]:
    notes = []
    if wide.recast:
        notes.append(
            f"the code itself asks for narrower formats than {dtype}; for comparison "
            f"{counted(wide.recast, 'operator')} ran in it"
        )
    if wide.error is not None and not wide.outputs:
        notes.append(f"nothing can be compared, because the run in {dtype} raised {wide.error}")
    return tuple(notes)
