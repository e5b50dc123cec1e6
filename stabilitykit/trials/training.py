"""`diagnose_training(make)`: why a training step in a narrow dtype fails, and what has been tried that cures it."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from stabilitykit.diagnosis import document, verdict
from stabilitykit.diagnosis.gradients import of
from stabilitykit.diagnosis.layers import peak, stored
from stabilitykit.diagnosis.training import advice
from stabilitykit.errors import MisuseError
from stabilitykit.formats import number_format
from stabilitykit.recorder.names import site_path
from stabilitykit.records import Record, Recording
from stabilitykit.records.training import TrainingDiagnosis, TrainingTrial
from stabilitykit.trials.reproduction import same_draws
from stabilitykit.trials.step import Clipping, Make, Ran, Step, built, distance, run
from stabilitykit.trials.widened import widened

_SMALLEST_SCALE = -24  # powers of two that are tried
_LARGEST_SCALE = 24
_EPS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
_MUCH = 0.01  # of all elements, lost to underflow


@dataclass(frozen=True)
class _Seen:
    """The step as it was given, in the narrow dtype and in float32, both recorded."""

    step: Step
    plain: Ran
    wide: Ran
    first: Record | None

    @cached_property
    def as_it_is(self) -> TrainingTrial:
        """The step as it was given, compared with float32's."""
        return _told(self, self.step, self.plain, "as it is", f"All of it in {self.step.dtype}.", "")

    @property
    def fails(self) -> bool:
        """Whether the step loses numbers, or makes other gradients than float32."""
        return not self.as_it_is.cured

    @property
    def underflows(self) -> bool:
        found = self.as_it_is.distance
        return found is not None and found.underflow > _MUCH


def diagnose_training(
    make: Make,
    *,
    dtype: str = "float16",
    loss_scale: float = 65536.0,
    clip: float | None = None,
    seed: int = 0,
    source: str | None = None,
) -> TrainingDiagnosis:
    """Runs a training step in `dtype` and in float32, and what may cure it, each on a model that is made anew.

    `make(dtype)`, given a torch.dtype, returns (model, kwargs, loss, optimizer): `model(**kwargs)` is called, and
    `loss(output)` gives a scalar. A step sets gradients to zero, runs the model, multiplies the loss by `loss_scale`,
    runs backward, divides the gradients by it, clips them to the norm `clip` if one is given, and has the optimiser
    make its step. It is run up to 30 times, each time from the same `seed`; random numbers go on afterwards as if
    nothing had been drawn.

    NaN and infinities are what it looks for: they end no trial. What a step raises is told in its trial.

    Raises MisuseError for a `make` that does not return these four, a loss that is no scalar, an unknown dtype, and a
    `loss_scale` or a `clip` that is not a finite number above 0.
    """
    number_format(dtype)
    for name, value in (("loss_scale", loss_scale), ("clip", clip)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise MisuseError(f"{name} has to be a finite number above 0, got {value}; the usual loss_scale is 65536.")
    with same_draws():
        return _diagnosed(Step(make=make, dtype=dtype, loss_scale=loss_scale, clip=clip, seed=seed), source)


def _diagnosed(step: Step, source: str | None) -> TrainingDiagnosis:
    notes: list[str] = []
    plain = run(step, recorded=True)
    wide = run(_float32(step, notes), recorded=True)
    assert plain.recording is not None
    seen = _Seen(step, plain, wide, _first_gradient(plain.recording))
    left_out: dict[str, str] = {}
    trials = sorted(_trials(seen, left_out), key=lambda one: (not one.cured, one.far))
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
        if name not in full or full[name].shape != held.shape or not torch.equal(full[name].to(target).to(held), held)
    ]
    if not differ:
        return wide
    notes.append(
        f"the weights that make gives in float32 are others ({differ[0]}), so that float32 runs with {step.dtype}'s"
    )
    return wide.but(weights=low)


def _weights(step: Step) -> dict[str, torch.Tensor]:
    torch.manual_seed(step.seed)
    model, *_ = built(step)
    return {name: held.detach() for name, held in model.named_parameters()}


def _first_gradient(recording: Recording) -> Record | None:
    """The first gradient that is not finite, whatever the forward pass was."""
    return next((record for record in recording if record.is_gradient and record.lost), None)


# What is tried


def _trials(seen: _Seen, left_out: dict[str, str]) -> Iterator[TrainingTrial]:
    step = seen.step
    code = "make(torch.{})  # the model, its inputs and its optimiser"
    if step.dtype != "bfloat16":
        yield _trial(seen, step.but(dtype="bfloat16"), "bfloat16", "All of it in bfloat16.", code.format("bfloat16"))
    yield _trial(seen, step.but(dtype="float32"), "float32", "All of it in float32.", code.format("float32"))
    if not (seen.fails or seen.underflows):
        left_out["smaller loss scale"] = "the step is finite, and little is lost to underflow."
        return
    yield from _of_scale(seen, left_out)
    yield from _of_operator(seen, left_out)
    yield from _of_eps(seen, left_out)
    autocast = f"with torch.autocast(device, torch.{step.dtype}): loss = ...  # of a model in float32"
    yield _trial(
        seen, step.but(dtype="float32", autocast=step.dtype), "master weights",
        f"Weights, their gradients and the optimiser in float32; products in {step.dtype}, by autocast.", autocast,
    )  # fmt: skip
    yield from _of_clipping(seen, left_out)


def _of_clipping(seen: _Seen, left_out: dict[str, str]) -> Iterator[TrainingTrial]:
    clip, scale = seen.step.clip, seen.step.loss_scale
    if clip is None:
        left_out["clipping"] = "the step does not clip."
        return
    unscale, clipped = "scaler.unscale_(optimizer)", f"clip_grad_norm_(model.parameters(), {clip:g})"
    wide = f"norm = get_total_norm([g.float() for g in grads]); clip_grads_with_norm_(parameters, {clip:g}, norm)"
    ways: tuple[tuple[Clipping, str, str], ...] = (
        (
            "after unscaling",
            f"Gradients are divided by the loss scale, then clipped to the norm {clip:g}.",
            f"{unscale}; {clipped}",
        ),
        (
            "before unscaling",
            f"Gradients are clipped to the norm {clip:g} while they are still multiplied by the loss scale, and then "
            f"divided by it: to the norm {clip / scale:.2g}.",
            f"{clipped}; {unscale}",
        ),
        ("in float32", "As after unscaling, by a norm that is summed in float32.", f"{unscale}; {wide}"),
    )
    for clipping, summary, command in ways:
        yield _trial(seen, seen.step.but(clipping=clipping), f"clipping {clipping}", summary, command)


def _of_scale(seen: _Seen, left_out: dict[str, str]) -> Iterator[TrainingTrial]:
    """The largest power of two with which gradients and weights are finite, found by trying: it loses least."""
    step = seen.step
    if seen.plain.finite and not seen.underflows:
        left_out["loss scale"] = "gradients are finite, and little is lost to underflow."
        return
    start = math.floor(math.log2(step.loss_scale))
    low, high = _SMALLEST_SCALE, math.ceil(math.log2(step.loss_scale))
    if seen.plain.finite:
        low, high = start, _LARGEST_SCALE + 1
    tried: dict[int, Ran] = {}

    def finite(power: int) -> bool:
        tried[power] = run(step.but(loss_scale=2.0**power))
        return tried[power].finite

    if not seen.plain.finite and not finite(low):
        left_out["smaller loss scale"] = f"not even at 2^{low} is every gradient finite."
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if finite(middle) else (low, middle)
    is_larger = 2.0**low > step.loss_scale
    if 2.0**low == step.loss_scale:
        left_out["larger loss scale"] = "no larger power of two leaves gradients finite."
        return
    name = "larger loss scale" if is_larger else "smaller loss scale"
    yield _told(
        seen, step.but(loss_scale=2.0**low), tried[low], name,
        f"2^{low}, the largest power of two with which every gradient is finite.",
        f"torch.amp.GradScaler(init_scale=2.0**{low})",
    )  # fmt: skip


def _of_operator(seen: _Seen, left_out: dict[str, str]) -> Iterator[TrainingTrial]:
    """The smallest module in float32 that cures it: the one whose output's gradient broke, or one around it."""
    first, step = seen.first, seen.step
    if first is None:
        left_out["float32 operator"] = "no gradient is lost."
        return
    model, *_ = built(step)
    paths = {site_path(name): name for name, _ in model.named_modules()}
    path = of(first).partition("/")[0]
    while path and path not in paths:
        path = path.rpartition(".")[0]
    last: TrainingTrial | None = None
    while path:
        for back in (True, False):
            last = _widened(seen, paths[path], back=back)
            if last.cured:
                yield last
                return
        path = path.rpartition(".")[0]
        if path and path.rpartition(".")[2].isdigit() and isinstance(model.get_submodule(paths[path]), nn.ModuleList):
            break
        while path and path not in paths:
            path = path.rpartition(".")[0]
    if last is None:
        left_out["float32 operator"] = f"{of(first)} is in no module but the model itself."
    else:
        yield last


def _widened(seen: _Seen, name: str, *, back: bool) -> TrainingTrial:
    def around(model: nn.Module) -> AbstractContextManager[None]:
        return widened(model.get_submodule(name), back=back)

    dtype = seen.step.dtype
    then = f"what it returns is rounded to {dtype} again" if back else "and what it returns stays float32"
    summary = f"{name} in float32, forward and backward: its inputs and weights are cast, {then}."
    command = f"with torch.autocast(device, enabled=False): ... {name.rpartition('.')[2]}(x.float())"
    return _trial(seen, seen.step.but(around=around), "float32 operator", summary, command)


def _of_eps(seen: _Seen, left_out: dict[str, str]) -> Iterator[TrainingTrial]:
    """The smallest eps of the optimiser with which the weights stay finite."""
    step = seen.step
    *_, optimizer = built(step)
    own = [group["eps"] for group in optimizer.param_groups if "eps" in group]
    if not own:
        left_out["larger eps"] = f"{type(optimizer).__name__} has no eps."
        return
    if not seen.plain.finite:
        left_out["larger eps"] = "gradients are lost before the optimiser's step."
        return
    if seen.plain.weights:
        left_out["larger eps"] = "the optimiser's step is finite."
        return
    for eps in (one for one in _EPS if one > max(own)):
        found = _trial(
            seen, step.but(eps=eps), "larger eps",
            f"The optimiser's eps is {eps:g} instead of {max(own):g}.",
            f"torch.optim.{type(optimizer).__name__}(..., eps={eps:g})",
        )  # fmt: skip
        if found.weights or eps == _EPS[-1]:
            yield found
            return


def _trial(seen: _Seen, step: Step, name: str, summary: str, command: str) -> TrainingTrial:
    return _told(seen, step, run(step), name, summary, command)


def _told(seen: _Seen, step: Step, ran: Ran, name: str, summary: str, command: str) -> TrainingTrial:
    return TrainingTrial(
        name=name,
        summary=summary,
        dtype=step.dtype,
        loss_scale=step.loss_scale,
        gradients=ran.finite,
        weights=ran.weights,
        loss=ran.loss,
        norm=ran.norm,
        distance=distance(ran, seen.wide),
        then=ran.then,
        command=command,
    )


# What is said


def _diagnosis(
    seen: _Seen, trials: tuple[TrainingTrial, ...], left_out: dict[str, str], notes: list[str], source: str | None
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
