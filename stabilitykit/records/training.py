"""What was tried against a training step that failed, and what came of it; written and read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Failure = Literal["gradients", "other gradients", "weights", "far"]

LOSS_SCALE = 65536.0
"""What a loss is multiplied by, unless it is said: GradScaler's first."""

_OTHER = 0.5  # of float32's largest
_FAR = 2.0  # times float32's farthest move


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientDistance:
    """How far the gradients of the weights, divided by the loss scale, are from float32's.

    Of `elements`, `compared` are finite in both. An error is in parts of the largest magnitude of float32's gradient of
    the same weight: its mean over the elements, and its maximum; None where nothing could be compared. `underflow` is
    the share of elements that are 0 although they are not in float32, `unscaled` that of those which become 0 only when
    they are divided by the loss scale, in the dtype in which they are stored. `lost` counts elements that are not
    finite.
    """

    elements: int
    compared: int
    error_mean: float | None
    error_max: float | None
    underflow: float
    unscaled: float
    lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTrial:
    """One change, and what the step came to with it, on a model that was made anew from the same seed.

    `gradients`: every weight's gradient is finite; `weights`: so is every weight after the optimiser's step. `move` is
    how far that step moved the weight which it moved farthest, in parts of the farthest move in float32; None where a
    weight is not finite, or float32 moves none. `norm` is that of all gradients, divided by the loss scale, before they
    are clipped. `then` is what was raised. `command` is what does it, as lines of Python. `together` are the names of
    the two trials whose changes were made at once; empty for one change.
    """

    name: str
    summary: str
    dtype: str
    loss_scale: float
    gradients: bool
    weights: bool
    loss: float | None
    norm: float | None
    distance: GradientDistance | None
    then: str
    command: str
    move: float | None = None
    together: tuple[str, ...] = ()

    @property
    def failures(self) -> frozenset[Failure]:
        """What is wrong with it: gradients or weights that are not finite, or others than float32's.

        A gradient whose largest error is half of float32's largest is another one, and so is a step that moves a weight
        more than twice as far as float32 moves any. Where gradients are not finite nothing is asked of what follows.
        """
        if not self.gradients:
            return frozenset(("gradients",))
        near = self.distance is not None and self.distance.error_max is not None and self.distance.error_max < _OTHER
        wrong: dict[Failure, bool] = {
            "other gradients": not near,
            "weights": not self.weights,
            "far": self.weights and self.move is not None and self.move > _FAR,
        }
        return frozenset(name for name, is_so in wrong.items() if is_so)

    @property
    def cured(self) -> bool:
        """Whether the step leaves finite gradients and finite weights, and no more is lost than by its rounding."""
        return not self.failures

    @property
    def far(self) -> float:
        """The mean error; infinite where nothing could be compared."""
        found = None if self.distance is None else self.distance.error_mean
        return float("inf") if found is None else found


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingDiagnosis:
    """A training step, where it fails, and what cures it: `trials`, what cures first, then by distance.

    `plain` is the step as it was given. `forward`: nothing was lost before the backward pass; `peak` and `peak_site`
    are its largest magnitude in `dtype`. `site` is what the first gradient that is not finite is of, None where all
    are; `kind`, `operator` and `value` are those of its break, and `reference` is the largest magnitude of that
    gradient in float32, at the same loss scale. `lost` are the weights whose gradients are not finite. `verdict` is
    what the records say, `advice` one paragraph. `left_out` says, by its name, why a change was not tried.
    """

    source: str | None
    dtype: str
    loss_scale: float
    clip: float | None
    verdict: str
    advice: str
    forward: bool
    peak: float | None
    peak_site: str | None
    site: str | None
    kind: str | None
    operator: str | None
    value: float | None
    reference: float | None
    lost: tuple[str, ...]
    plain: TrainingTrial
    trials: tuple[TrainingTrial, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    findings: Mapping[str, Any] = field(default_factory=dict)
    schema: int = 1

    def __getitem__(self, name: str) -> TrainingTrial:
        """Raises KeyError for what was not tried."""
        return {trial.name: trial for trial in self.trials}[name]

    @property
    def finite(self) -> bool:
        """Whether the step leaves finite gradients and finite weights."""
        return self.plain.gradients and self.plain.weights

    @property
    def pairs(self) -> tuple[TrainingTrial, ...]:
        """Two changes at once that cure it, where neither of them does alone; the best first."""
        return tuple(trial for trial in self.cures if trial.together)

    @property
    def cures(self) -> tuple[TrainingTrial, ...]:
        """The trials that cure it, the best first."""
        return tuple(trial for trial in self.trials if trial.cured)
