"""What is tried against a training step: one change at a time, and two where the first leaves another failure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import nn

from stabilitykit.diagnosis.gradients import of
from stabilitykit.recorder.names import site_path
from stabilitykit.records import Record
from stabilitykit.records.training import Failure, TrainingTrial
from stabilitykit.trials.step import Clipping, Ran, Step, built, distance, run
from stabilitykit.trials.widened import widened
from stabilitykit.words import number

_SMALLEST_SCALE = -24  # powers of two that are tried
_LARGEST_SCALE = 24
_EPS = tuple(float(f"1e-{power}") for power in range(7, 0, -1))
_MUCH = 0.01  # of all elements, lost to underflow
_SCALED = (
    "torch.amp.GradScaler(init_scale={0})  # which takes no float16 gradients: for these (loss * {0}).backward(), and "
    "p.grad /= {0}"
)
_OF_THE_OPTIMISER: frozenset[Failure] = frozenset(("weights", "far"))

Family = Literal["dtype", "loss scale", "operator", "eps", "master weights", "clipping"]


@dataclass(frozen=True)
class Seen:
    """A step in the narrow dtype, and the step in float32 that it is compared with.

    `first` is the record of the first gradient that is lost, None where none is, or where the step was not recorded.
    `after` is the kind of change that was made already, None for the step as it was given.
    """

    step: Step
    plain: Ran
    wide: Ran
    first: Record | None
    after: Family | None = None

    @cached_property
    def as_it_is(self) -> TrainingTrial:
        """The step without any further change, compared with float32's."""
        return _trial(self, self.step, self.plain, "as it is", f"All of it in {self.step.dtype}.", "")

    @property
    def fails(self) -> bool:
        """Whether the step loses numbers, or makes other gradients or weights than float32."""
        return not self.as_it_is.cured

    @property
    def underflows(self) -> bool:
        found = self.as_it_is.distance
        return found is not None and found.underflow > _MUCH

    def is_mended_by(self, trial: TrainingTrial) -> bool:
        """Whether something that fails in the step does not with a change, whatever fails after it."""
        return bool(self.as_it_is.failures - trial.failures)


@dataclass(frozen=True, kw_only=True)
class _Change:
    """A change that was run: what it makes of a Step, what that came to, and what it is called beside another one."""

    family: Family
    part: str
    changes: Mapping[str, Any]
    step: Step
    ran: Ran
    trial: TrainingTrial


def tried(seen: Seen, left_out: dict[str, str]) -> Iterator[TrainingTrial]:
    """What every change that fits comes to; `left_out` is told of those that do not, and why."""
    for dtype in ("bfloat16", "float32"):
        if dtype != seen.step.dtype:
            command = f"make(torch.{dtype})  # the model, its inputs and its optimiser"
            yield _made(seen, "dtype", {"dtype": dtype}, dtype, f"All of it in {dtype}.", command).trial
    if not (seen.fails or seen.underflows):
        left_out["smaller loss scale"] = "the step is finite, and little is lost to underflow."
        return
    single = list(_changes(seen, left_out))
    yield from (one.trial for one in single)
    yield from _pairs(seen, single, left_out)


def _changes(seen: Seen, left_out: dict[str, str]) -> Iterator[_Change]:
    yield from _of_scale(seen, left_out)
    yield from _of_operator(seen, left_out)
    yield from _of_eps(seen, left_out)
    yield from _of_master_weights(seen)
    yield from _of_clipping(seen, left_out)


def _pairs(seen: Seen, single: Sequence[_Change], left_out: dict[str, str]) -> Iterator[TrainingTrial]:
    """Where a change mends what fails and the step then fails at something else: it, and what fits that.

    What did not fit the step as it is, is tried alone too, so that both are known to be needed.
    """
    alone = {one.family for one in single}
    cures = {one.family for one in single if one.trial.cured}
    done: set[frozenset[Family]] = set()
    for first in single:
        if first.trial.cured or not seen.is_mended_by(first.trial):
            continue
        now: set[frozenset[Family]] = set()
        then = replace(seen, step=first.step, plain=first.ran, first=None, after=first.family)
        for second in _changes(then, {}):
            families = frozenset((first.family, second.family))
            if second.family in cures or len(families) == 1 or families in done:
                continue
            now.add(families)
            trial = second.trial
            if second.family not in alone:
                alone.add(second.family)
                left_out.pop(trial.name, None)
                yield _made(
                    seen, second.family, second.changes, trial.name, trial.summary, trial.command
                ).trial  # fmt: skip
            yield replace(
                trial,
                name=f"{first.part} and {second.part}",
                summary=f"{first.trial.summary} {trial.summary}",
                command=f"{first.trial.command}\n{trial.command}",
                together=(first.trial.name, trial.name),
            )
        done |= now


def _of_scale(seen: Seen, left_out: dict[str, str]) -> Iterator[_Change]:
    """The largest power of two with which gradients and weights are finite, found by trying: it loses least."""
    step = seen.step
    if seen.plain.finite and not seen.underflows:
        left_out["loss scale"] = "gradients are finite, and little is lost to underflow."
        return
    start = math.floor(math.log2(step.loss_scale))
    low, high = _SMALLEST_SCALE, math.ceil(math.log2(step.loss_scale))
    if seen.plain.finite:
        low, high = start, _LARGEST_SCALE + 1
    ran: dict[int, Ran] = {}

    def finite(power: int) -> bool:
        ran[power] = run(step.but(loss_scale=2.0**power))
        return ran[power].finite

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
    yield _made(
        seen, "loss scale", {"loss_scale": 2.0**low}, name,
        f"The loss scale is 2^{low}, the largest power of two with which every gradient is finite.",
        _SCALED.format(f"2.0**{low}"), part=f"loss scale {number(2.0**low)}", ran=ran[low],
    )  # fmt: skip


def _of_operator(seen: Seen, left_out: dict[str, str]) -> Iterator[_Change]:
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
    last: _Change | None = None
    while path:
        for back in (True, False):
            last = _widened(seen, paths[path], back=back)
            if last.trial.cured or seen.is_mended_by(last.trial):
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


def _widened(seen: Seen, name: str, *, back: bool) -> _Change:
    def around(model: nn.Module) -> AbstractContextManager[None]:
        return widened(model.get_submodule(name), back=back)

    dtype = seen.step.dtype
    then = f"what it returns is rounded to {dtype} again" if back else "and what it returns stays float32"
    summary = f"{name} in float32, forward and backward: its inputs and weights are cast, {then}."
    command = f"with torch.autocast(device, enabled=False): ... {name.rpartition('.')[2]}(x.float())"
    return _made(seen, "operator", {"around": around}, "float32 operator", summary, command)


def _of_eps(seen: Seen, left_out: dict[str, str]) -> Iterator[_Change]:
    """The smallest eps of the optimiser with which weights stay finite, and move no farther than they should."""
    step = seen.step
    *_, optimizer = built(step)
    own = [group["eps"] for group in optimizer.param_groups if "eps" in group]
    if not own:
        left_out["larger eps"] = f"{type(optimizer).__name__} has no eps."
        return
    if not seen.plain.finite:
        left_out["larger eps"] = "gradients are lost before the optimiser's step."
        return
    if not seen.as_it_is.failures & _OF_THE_OPTIMISER:
        left_out["larger eps"] = "the optimiser's step is finite."
        return
    for eps in (one for one in _EPS if one > max(own)):
        short, before = _short(eps), _short(max(own))
        found = _made(
            seen, "eps", {"eps": eps}, "larger eps", f"The optimiser's eps is {short} instead of {before}.",
            f"torch.optim.{type(optimizer).__name__}(..., eps={short})", part=f"eps {short}",
        )  # fmt: skip
        if not found.trial.failures & _OF_THE_OPTIMISER or eps == _EPS[-1]:
            yield found
            return


def _short(eps: float) -> str:
    """1e-4"""
    return f"{eps:g}" if 0 < eps != float(f"{eps:.0e}") else f"{eps:.0e}".replace("e-0", "e-")


def _of_master_weights(seen: Seen) -> Iterator[_Change]:
    if seen.after in ("operator", "eps"):  # autocasting casts again what was cast, and no eps is 0 in float32
        return
    dtype = seen.step.dtype
    yield _made(
        seen, "master weights", {"dtype": "float32", "autocast": dtype}, "master weights",
        f"Weights, their gradients and the optimiser in float32; products in {dtype}, by autocast.",
        f"with torch.autocast(device, torch.{dtype}): loss = ...  # of a model in float32",
    )  # fmt: skip


def _of_clipping(seen: Seen, left_out: dict[str, str]) -> Iterator[_Change]:
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
        if not seen.after or clipping != seen.step.clipping:
            yield _made(seen, "clipping", {"clipping": clipping}, f"clipping {clipping}", summary, command)


def _made(
    seen: Seen,
    family: Family,
    changes: Mapping[str, Any],
    name: str,
    summary: str,
    command: str,
    *,
    part: str | None = None,
    ran: Ran | None = None,
) -> _Change:
    """The step with a change, run unless it was already."""
    step = seen.step.but(**changes)
    ran = ran or run(step)
    trial = _trial(seen, step, ran, name, summary, command)
    return _Change(family=family, part=part or name, changes=changes, step=step, ran=ran, trial=trial)


def _trial(seen: Seen, step: Step, ran: Ran, name: str, summary: str, command: str) -> TrainingTrial:
    most = seen.wide.moved
    return TrainingTrial(
        name=name,
        summary=summary,
        dtype=step.dtype,
        loss_scale=step.loss_scale,
        gradients=ran.finite,
        weights=ran.weights,
        move=ran.moved / most if ran.moved is not None and most else None,
        loss=ran.loss,
        norm=ran.norm,
        distance=distance(ran, seen.wide),
        then=ran.then,
        command=command,
    )
