"""A failure, diagnosed by experiment: run as it is, in wider formats, and with every candidate that fits."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.diagnosis import document, verdict
from stabilitykit.diagnosis.outcome import Outcome, decisive
from stabilitykit.diagnosis.trials import advice
from stabilitykit.errors import MisuseError
from stabilitykit.formats import FORMATS
from stabilitykit.models.devices import parse_dtype
from stabilitykit.recorder.names import site_path
from stabilitykit.recorder.weights import check_weights
from stabilitykit.records import Recording
from stabilitykit.records.trials import Diagnosis, Rounding, Trial
from stabilitykit.run.case import Progress
from stabilitykit.trials.answers import Answers, answers
from stabilitykit.trials.attempts import Attempt, Attempts
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.candidates import CANDIDATES
from stabilitykit.trials.columns import given_call
from stabilitykit.trials.compare import Compared, Row, compare
from stabilitykit.trials.harm import harm, harmed, without_overflow
from stabilitykit.trials.minimise import has_tokens
from stabilitykit.trials.minimise import minimise as smallest_of
from stabilitykit.trials.recast import Recast
from stabilitykit.trials.reproduction import Given, Kept, Reproduction, copied, dtype_of, same_draws
from stabilitykit.trials.rounding import CLOSE, rounding
from stabilitykit.trials.situation import OVERFLOWS, Recorded, Situation, look, recorded
from stabilitykit.trials.stored import wide_like
from stabilitykit.words import counted, number


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
        minimise: look for the smallest part of the input that fails alike first, and diagnose that, among rows and
            tokens of `input_ids`, or of whatever argument holds token ids; masks, positions and what else has a column
            for each are cut with them. What cures it is tried on the whole input, too.
        compiled: compare a run that stays in range with one through torch.compile, too, which takes a minute or so.
        progress: called with (what is being done, how much of it is done, out of how much).
        kwargs: what it is called with, by name.

    Returns:
        A Diagnosis. The model, its buffers, the random numbers that follow and the arguments, a cache among them, stay
        as they are: copies are run.

    Raises:
        MisuseError: for what is not a module or a method of one, for a model that cannot be copied, for a call that
            raises before anything is computed, and with `minimise` for arguments without token ids.
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
        notes=(*rounded_note(owner, given, reference), *_past_note(args, kwargs, failing_dtype(dtype, given))),
    )
    return of_reproduction(
        _where_it_fails(reproduction, dtype, given), minimise=minimise, compiled=compiled, progress=progress
    )


def diagnose_run(
    model: nn.Module, run: Callable[[nn.Module], Any], *, dtype: str | None = None, grad: bool = False, **how: Any
) -> Diagnosis:
    """As `diagnose`, for whatever `run(model)` does with a model; it must not keep anything between two runs.

    `grad`: it runs a backward pass. The gradients that it leaves at the model's weights are then compared, too, and
    were set to None before. Changes that help a gradient are tried on a training step, by `diagnose_training`.
    """
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


def _past_note(args: Sequence[Any], kwargs: Mapping[str, Any], dtype: str) -> tuple[str, ...]:
    """Of an argument that is finite, and past the maximum of the dtype that it is cast to."""
    limit = torch.finfo(getattr(torch, dtype)).max
    named = [*((f"argument {place}", one) for place, one in enumerate(args, 1)), *kwargs.items()]
    for name, value in named:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            largest = float(value.abs().max())
            if limit < largest < math.inf:
                return (f"{name} reaches {number(largest)}, which {dtype} does not hold; it is cast to {dtype} here",)
    return ()


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
        models = Kept(reproduction)
        if not minimise:
            found = _Diagnosing(models, progress, compiled).run()
        else:
            found = _minimised(models, progress, compiled)
        return replace(found, command=command, advice=advice(found))


def _minimised(models: Kept, progress: Progress | None, compiled: bool) -> Diagnosis:
    """The smallest input that fails alike is looked for, and diagnosed; what cures it is tried on the whole one.

    The whole one is diagnosed where nothing breaks, and where what breaks does a smaller one no harm.
    """
    whole = models.of
    if not has_tokens(whole):
        raise MisuseError(
            "Only an input with tokens can be made smaller: prompts, or token ids [rows, columns] among a call's "
            "arguments, such as input_ids. This one has none; leave minimise out."
        )
    smaller = smallest_of(whole, model=models.model(whole.dtype), progress=progress)
    if smaller is not None and smaller.smallest.is_smaller:
        diagnosing = _Diagnosing(models.on(smaller.reproduction), progress, compiled)
        found = diagnosing.run()
        if not found.is_well:
            trials = diagnosing.on_whole(models, found.trials)
            return replace(found, smallest=smaller.smallest, diagnosed="smallest", trials=trials)
    found = _Diagnosing(models, progress, compiled).run()
    if smaller is None:
        return replace(found, notes=(*found.notes, "nothing breaks, so that no token was left out"))
    return replace(found, smallest=smaller.smallest)


class _Diagnosing:
    def __init__(self, models: Kept, progress: Progress | None, compiled: bool) -> None:
        self.compiled = compiled
        self.models = models
        self.reproduction = reproduction = models.of
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
        if wide.answers.error is not None and not [*plain.recording, *wide.recording]:
            raise MisuseError(
                f"The run raises in {self.wide} as well, before anything is computed, so there is nothing to diagnose: "
                f"{wide.answers.error}. Check how the model is called."
            )
        low = compare(plain.answers, wide.answers)
        trying = Attempts(self.models, self.wide, wide.answers)
        attempts = [
            trying.of_wide(one, wide) if one.dtype == self.wide else trying.attempt(one) for one in self.dtypes()
        ]
        beyond = decisive(wide.recording)
        broke = None if beyond is None else beyond.broke.broke
        if self.wide == "float32" and broke is not None and broke.kind in OVERFLOWS:
            attempts.append(trying.attempt(self.format("float64")))
        tolerance = self.tolerance = trying.tolerance(attempts)
        never = _lost(wide.answers)
        concerned = low.lost() | {row for row, error in low.error.items() if error > tolerance}
        self.find_weights(plain.recording)
        situation = look(self.models, plain.recording, wide)
        without, rows = None, set[Row]()
        if plain.answers.finite and situation.found is not None:
            self.tell("measuring the harm", 0, 1)
            without = without_overflow(situation, lambda one: trying.attempt(one).compared)
            rows = harmed(situation, low, without, tolerance)
        left_out: dict[str, str] = {}
        is_wrong = not plain.answers.finite or bool(concerned or rows)
        if situation.found is not None and is_wrong and not situation.found.broke.is_gradient:
            made, left_out = self.offers(situation)
            self.models.drop("bfloat16")
            for done, one in enumerate(made):
                self.tell(f"trying: {one.name}", done, len(made))
                attempts.append(trying.attempt(one))
        rounded, unrounded = tuple[Rounding, ...](), tuple[str, ...]()
        is_close = (low.distance().error_max or 0.0) <= CLOSE
        if not is_wrong and is_close and not reproduction.grad:
            self.tell("comparing ways to run it", 0, 1)
            rounded, unrounded = rounding(self.models, self.models.model(self.wide), compiled=self.compiled)
        exact = tolerance
        if is_wrong and any(_is_doubtful(one, tolerance, self.dtype) for one in attempts):
            self.tell("measuring what rounding alone does", 0, 1)
            exact = max(tolerance, trying.rounding())
        within = without if rows and not concerned else None  # as close as bfloat16, and wrong for all that
        trials = [
            _judged(one, tolerance if one.candidate.lossy else exact, concerned | rows, never, self.dtype, within)
            for one in attempts
        ]
        # What records propose may have been tried, and have failed; another way to write an exponential has not.
        is_tried = any(not trial.is_format or (trial.cured and is_wrong) for trial in trials)
        made_worse = harm(situation, low, plain.answers, without, rows) if plain.answers.finite else None
        said = verdict(
            plain.recording,
            wide.recording,
            advise=(not is_tried or situation.part == "exp") and (made_worse is None or made_worse.harmful),
            tries=False,  # this is it
            harmful=None if made_worse is None else made_worse.harmful,
        )
        self.candidates = {one.candidate.name: one.candidate for one in attempts}
        return Diagnosis(
            source=reproduction.source,
            dtype=self.dtype,
            verdict=said,
            advice="",
            finite=plain.answers.finite,
            plain=low.distance(),
            trials=tuple(sorted(trials, key=_order)),
            harm=made_worse,
            rounding=rounded,
            left_out=left_out,
            notes=(*reproduction.notes, *_notes(wide.answers, self.wide), *unrounded),
            findings=document(plain.recording, wide.recording) | {"verdict": said},
        )

    def on_whole(self, whole: Kept, trials: Sequence[Trial]) -> tuple[Trial, ...]:
        """Tries what cures a part of an input on all of it, the best first, until something cures that, too."""
        cures, told = [one.name for one in trials if one.cured], dict[str, bool]()
        if cures:
            self.tell("trying on the whole input", 0, len(cures))
            recast = Recast(getattr(torch, self.wide))
            reference = answers(whole.of, whole.model(self.wide), recast=recast)
            trying = Attempts(whole, self.wide, reference)
        for done, name in enumerate(cures):
            self.tell(f"trying on the whole input: {name}", done, len(cures))
            attempt = trying.bare(_on(whole.of, self.candidates[name]))
            told[name] = _judged(attempt, self.tolerance, set(), _lost(reference), self.dtype, None).cured
            if told[name]:
                break
        return tuple(replace(one, cures_whole=told.get(one.name)) for one in trials)

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

    def dtypes(self) -> list[Candidate]:
        """Other dtypes: is it the format at all, and which one is finite?"""
        others = [one for one in ("bfloat16", "float32") if one != self.dtype]
        if self.dtype == "float32":
            others = ["float64"]
        elif self.dtype.startswith("float8"):  # what is bfloat16 casts to it all the same
            others = ["float32"]
        return [self.format(one) for one in others]

    def format(self, name: str) -> Candidate:
        return Candidate(
            name=name,
            summary=f"Everything in {name}.",
            command=self.reproduction.in_dtype(name),
            dtype=name,
            carried=True,
            extra=self.bytes(name),
        )

    def bytes(self, dtype: str) -> int:
        """Of weights in `dtype`, beyond those of the failing run."""
        return max(0, _bytes(self.models.model(dtype)) - _bytes(self.model))

    def offers(self, situation: Situation) -> tuple[list[Candidate], dict[str, str]]:
        made: dict[str, Candidate] = {}
        left_out: dict[str, str] = {}
        for place, offer in enumerate(CANDIDATES):
            self.tell("looking for candidates", place, len(CANDIDATES))
            with same_draws():  # models that are built to look at draw weights
                offered = list(offer(situation))
            for one in offered:
                if isinstance(one, Candidate):
                    made.setdefault(one.name, one)
                else:
                    left_out[one.name] = one.why
        return list(made.values()), {name: why for name, why in left_out.items() if name not in made}


def _on(reproduction: Reproduction, candidate: Candidate) -> Candidate:
    """A candidate for a run of another input."""
    if candidate.instead is None:
        return candidate
    return replace(candidate, instead=replace(candidate.instead, of=reproduction))


def _lost(wide: Answers) -> set[Row]:
    return {(output, row) for output, one in enumerate(wide.outputs) for row in one.lost}


def _is_doubtful(one: Attempt, tolerance: float, dtype: str) -> bool:
    """Whether a change within the dtype that is exact is farther from float32 than bfloat16 is."""
    far = one.compared.distance().error_max
    is_within = one.candidate.dtype in (None, dtype)
    return is_within and one.finite and not one.candidate.lossy and (far or 0.0) > tolerance


def _bytes(model: nn.Module) -> int:
    return sum(one.nbytes for one in model.parameters() if one.is_floating_point())


def _judged(
    one: Attempt, tolerance: float, concerned: set[Row], never: set[Row], dtype: str, within: Compared | None
) -> Trial:
    """Whether it is as close to float32 as 16 bits come, and a change within the dtype as close as `within`, too.

    `never` are the rows that float32 loses: with a change that it needs too, any finite number will do there.
    """
    candidate, distance = one.candidate, one.compared.distance()
    differs = candidate.reference is not None or (candidate.dtype == "float64" and dtype != "float32")
    wanted = one.compared.distance(one.compared.error.keys() - never) if differs else distance
    is_close = distance.rows > 0 and wanted.compared == wanted.rows and (wanted.error_max or 0.0) <= tolerance
    if within is not None and candidate.dtype in (None, dtype):
        is_close = is_close and not one.compared.farther_than(within)
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
