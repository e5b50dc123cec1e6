"""One training step, run by the kit on a model that is made for it: from zero gradients to the optimiser's step."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stabilitykit.errors import MisuseError
from stabilitykit.recorder import record
from stabilitykit.records import Recording
from stabilitykit.records.training import GradientDistance
from stabilitykit.trials.reproduction import same_draws

Made = tuple[nn.Module, Mapping[str, Any], Callable[[Any], Tensor], torch.optim.Optimizer]
Make = Callable[[torch.dtype], Made]
Clipping = Literal["after unscaling", "before unscaling", "in float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How a step is run: `make(dtype)` gives (model, kwargs, loss, optimizer), `loss` a scalar of the model's output.

    `autocast` is the dtype of a block around the forward pass, `eps` replaces the optimiser's. `around` is entered with
    the model while it runs, forward and backward. `weights` are put into the model before, by name.
    """

    make: Make
    dtype: str
    loss_scale: float
    clip: float | None = None
    clipping: Clipping = "after unscaling"
    autocast: str | None = None
    eps: float | None = None
    around: Callable[[nn.Module], AbstractContextManager[None]] = lambda model: nullcontext()
    weights: Mapping[str, Tensor] | None = None
    seed: int = 0

    def but(self, **changes: Any) -> "Step":
        return replace(self, **changes)


@dataclass(slots=True)
class Ran:
    """What a step came to: its loss, each weight's gradient divided by the loss scale, in float32, and whether it was 0
    only after it had been divided in its own dtype; the norm of all; whether every weight is finite afterwards.

    `moved` is how far the optimiser moved that weight which it moved farthest, beyond what rounding can have added;
    None where one is not finite. `then`: what was raised.
    """

    loss: float | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    vanished: int = 0
    norm: float | None = None
    weights: bool = False
    moved: float | None = None
    then: str = ""
    recording: Recording | None = None

    @property
    def finite(self) -> bool:
        """Whether every gradient is."""
        return not self.then and all(bool(one.isfinite().all()) for one in self.gradients.values())


def run(step: Step, *, recorded: bool = False) -> Ran:
    """Runs a step. What it raises is told; random numbers go on afterwards as if nothing had been drawn.

    Raises MisuseError where `make` does not give what it should, or gives a loss that is no scalar.
    """
    ran = Ran()
    with same_draws():
        torch.manual_seed(step.seed)
        model, kwargs, loss, optimizer = built(step)
        try:
            _run(step, ran, model, kwargs, loss, optimizer, recorded=recorded)
        except MisuseError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            ran.then = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return ran


def built(step: Step) -> Made:
    """What `make` gives, checked, with the weights that the step asks for."""
    made: Any = step.make(getattr(torch, step.dtype))
    what = "a make(dtype) for training has to return (model, kwargs, loss, optimizer)"
    if not isinstance(made, tuple | list) or len(made) != 4:
        came = f"{len(made)} values" if isinstance(made, tuple) else type(made).__name__
        raise MisuseError(f"{what}; it returned {came}.")
    model, kwargs, loss, optimizer = made
    checks = (nn.Module, Mapping, Callable, torch.optim.Optimizer)
    for one, kind in zip(made, checks, strict=True):
        if not isinstance(one, kind):  # type: ignore[arg-type]
            raise MisuseError(f"{what}; in the place of a {getattr(kind, '__name__', kind)} came {type(one).__name__}.")
    if step.weights is not None:
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, held in step.weights.items():
                if name in own:
                    own[name].copy_(held)
    for group in optimizer.param_groups:
        if step.eps is not None and "eps" in group:
            group["eps"] = step.eps
    return model, kwargs, loss, optimizer


def _run(
    step: Step,
    ran: Ran,
    model: nn.Module,
    kwargs: Mapping[str, Any],
    loss: Callable[[Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    recorded: bool,
) -> None:
    optimizer.zero_grad()
    device = next((held.device.type for held in model.parameters()), "cpu")
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(step.around(model))
        if recorded:
            case = {"loss_scale": step.loss_scale}
            ran.recording = stack.enter_context(record(model, backward=True, case=case))
        with torch.autocast(device, getattr(torch, step.autocast)) if step.autocast else nullcontext():
            value = loss(model(**kwargs))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise MisuseError(f"loss(output) has to return a scalar tensor, got {_shape(value)}; take its mean.")
        ran.loss = float(value.detach())
        (value * step.loss_scale).backward()  # type: ignore[no-untyped-call]
    named = {name: held for name, held in model.named_parameters() if held.grad is not None}
    for name, held in named.items():
        assert held.grad is not None
        ran.gradients[name] = (held.grad.detach().double() / step.loss_scale).float()
    ran.norm = _norm(ran.gradients.values())
    clip = step.clip
    if clip is not None and step.clipping == "before unscaling":
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    for held in named.values():
        assert held.grad is not None
        some = held.grad != 0
        held.grad.div_(step.loss_scale)
        ran.vanished += int((some & (held.grad == 0)).sum())
    if clip is not None and step.clipping == "after unscaling":
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    if clip is not None and step.clipping == "in float32":
        nn.utils.clip_grads_with_norm_(model.parameters(), clip, torch.tensor(ran.norm))
    if clip is not None:
        ran.gradients = {name: _kept(held.grad) for name, held in named.items()}
    before = {name: held.detach().clone() for name, held in named.items()}
    optimizer.step()
    ran.weights = all(bool(held.isfinite().all()) for held in model.parameters())
    if ran.weights:
        ran.moved = max((_moved(before[name], held) for name, held in named.items()), default=0.0)


def _moved(before: Tensor, after: Tensor) -> float:
    """The largest difference, without what a number of 16 bits is rounded by when a move is added to it."""
    away = (after.detach().double() - before.double()).abs()
    if before.element_size() < 4:
        away -= before.double().abs() * torch.finfo(before.dtype).eps / 2
    return float(away.max().clamp(min=0)) if away.numel() else 0.0


def _norm(gradients: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(one.double().square().sum()) for one in gradients))


def _kept(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.detach().float().clone()


def _shape(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def distance(ran: Ran, reference: Ran) -> GradientDistance | None:
    """How far a step's gradients are from those of the step in float32; None where there are none to compare."""
    elements = compared = lost = underflow = 0
    total, largest = 0.0, None
    for name, wide in reference.gradients.items():
        ours = ran.gradients.get(name)
        if ours is None or ours.shape != wide.shape:
            continue
        both = ours.isfinite() & wide.isfinite()
        elements += wide.numel()
        compared += int(both.sum())
        lost += int((~ours.isfinite()).sum())
        underflow += int((both & (ours == 0) & (wide != 0)).sum())
        scale = float(wide[wide.isfinite()].abs().max()) if bool(wide.isfinite().any()) else 0.0
        if scale and bool(both.any()):
            away = (ours[both].double() - wide[both].double()).abs() / scale
            total += float(away.sum())
            largest = max(largest or 0.0, float(away.max()))
    if not elements:
        return None
    return GradientDistance(
        elements=elements,
        compared=compared,
        error_mean=None if largest is None else total / compared,
        error_max=largest,
        underflow=underflow / elements,
        unscaled=ran.vanished / elements,
        lost=lost,
    )
