"""`diagnose_training(make)`: why a training step in a narrow dtype fails, and what has been tried that cures it."""

import math
from dataclasses import replace

import torch

from stabilitykit.diagnosis import document, verdict
from stabilitykit.diagnosis.gradients import of
from stabilitykit.diagnosis.layers import peak, stored
from stabilitykit.diagnosis.training import advice
from stabilitykit.errors import MisuseError
from stabilitykit.formats import number_format
from stabilitykit.records import Record, Recording
from stabilitykit.records.training import LOSS_SCALE, TrainingDiagnosis, TrainingTrial
from stabilitykit.run.case import Progress
from stabilitykit.trials.reproduction import same_draws
from stabilitykit.trials.step import Make, Step, built, run
from stabilitykit.trials.step_changes import Seen, tried

_ABOUT = 12  # changes that are tried, of which nobody knows beforehand how many there will be


def diagnose_training(
    make: Make,
    *,
    dtype: str = "float16",
    loss_scale: float = LOSS_SCALE,
    clip: float | None = None,
    seed: int = 0,
    source: str | None = None,
    progress: Progress | None = None,
) -> TrainingDiagnosis:
    """Runs a training step in `dtype` and in float32, and what may cure it, each on a model that is made anew.

    `make(dtype)`, given a torch.dtype, returns (model, kwargs, loss, optimizer): `model(**kwargs)` is called, and
    `loss(output)` gives a scalar. A step sets gradients to zero, runs the model, multiplies the loss by `loss_scale`,
    runs backward, divides the gradients by it, clips them to the norm `clip` if one is given, and has the optimiser
    make its step. It is run up to 60 times, each time from the same `seed`; random numbers go on afterwards as if
    nothing had been drawn. `progress` is called with (what is being done, how much of it is done, out of how much).

    NaN and infinities are what it looks for: they end no trial. What a step raises is told in its trial.

    Raises MisuseError for a `make` that does not return these four, a loss that is no scalar, an unknown dtype, and a
    `loss_scale` or a `clip` that is not a finite number above 0.
    """
    number_format(dtype)
    for name, value in (("loss_scale", loss_scale), ("clip", clip)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise MisuseError(f"{name} has to be a finite number above 0, got {value}; the usual loss_scale is 65536.")
    with same_draws():
        return _diagnosed(Step(make=make, dtype=dtype, loss_scale=loss_scale, clip=clip, seed=seed), source, progress)


def _diagnosed(step: Step, source: str | None, progress: Progress | None) -> TrainingDiagnosis:
    notes: list[str] = []
    tell = progress or (lambda what, done, total: None)
    tell(f"recording the step in {step.dtype}", 0, 1)
    plain = run(step, recorded=True)
    tell("recording the step in float32", 0, 1)
    wide = run(_float32(step, notes), recorded=True)
    assert plain.recording is not None
    seen = Seen(step, plain, wide, _first_gradient(plain.recording))
    left_out: dict[str, str] = {}
    trials: list[TrainingTrial] = []
    tell("trying changes", 0, _ABOUT)
    for one in tried(seen, left_out):
        trials.append(one)
        tell("trying changes", min(len(trials), _ABOUT), _ABOUT)
    trials.sort(key=lambda one: (not one.cured, one.far))
    found = _diagnosis(seen, tuple(trials), left_out, notes, source)
    return replace(found, advice=advice(found))


def _float32(step: Step, notes: list[str]) -> Step:
    """The same step in float32, with the same weights: rounded, where `make` gives others in float32."""
    wide = step.but(dtype="float32")
    low, full = _weights(step), _weights(wide)
    target = getattr(torch, step.dtype)
    differ = [
        name
        for name, held in low.items()
        if name not in full or full[name].shape != held.shape or not _same_but_rounded(full[name], held, target)
    ]
    if not differ:
        return wide
    notes.append(
        f"the weights that make gives in float32 are others ({differ[0]}), so that float32 runs with {step.dtype}'s"
    )
    return wide.but(weights=low)


def _same_but_rounded(wide: torch.Tensor, low: torch.Tensor, dtype: torch.dtype) -> bool:
    """Also where `make` keeps weights in float32 and autocasts to `dtype`."""
    return torch.equal(wide.to(low), low) or torch.equal(wide.to(dtype).to(low), low)


def _weights(step: Step) -> dict[str, torch.Tensor]:
    torch.manual_seed(step.seed)
    model, *_ = built(step)
    return {name: held.detach() for name, held in model.named_parameters()}


def _first_gradient(recording: Recording) -> Record | None:
    """The first gradient that is not finite, whatever the forward pass was."""
    return next((record for record in recording if record.is_gradient and record.lost), None)


def _diagnosis(
    seen: Seen, trials: tuple[TrainingTrial, ...], left_out: dict[str, str], notes: list[str], source: str | None
) -> TrainingDiagnosis:
    recording, first = seen.plain.recording, seen.first
    assert recording is not None
    forward = [record for record in recording if not record.is_gradient]
    top = peak(stored(recording))
    broke = None if first is None else first.broke
    wide = None if seen.wide.recording is None or first is None else _same(seen.wide.recording, first)
    return TrainingDiagnosis(
        source=source,
        dtype=seen.step.dtype,
        loss_scale=seen.step.loss_scale,
        clip=seen.step.clip,
        verdict=verdict(recording, advise=False),
        advice="",
        forward=not any(record.lost for record in forward),
        peak=None if top is None else top.amax,
        peak_site=None if top is None else top.site,
        site=None if first is None else of(first),
        kind=None if broke is None else broke.kind,
        operator=None if first is None else first.operator,
        value=None if broke is None else broke.value,
        reference=None if wide is None else wide.amax,
        lost=tuple(name for name, grad in seen.plain.gradients.items() if not bool(grad.isfinite().all())),
        plain=seen.as_it_is,
        trials=trials,
        left_out=left_out,
        notes=tuple(notes),
        findings=document(recording),
    )


def _same(recording: Recording, of: Record) -> Record | None:
    """The record of the same gradient in another run."""
    return next((one for one in recording if one.site == of.site and one.step == of.step), None)
