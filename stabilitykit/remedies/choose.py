"""The scaling that keeps a model finite in float16 on the inputs that choose, or what stands in its way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from stabilitykit.errors import MisuseError
from stabilitykit.models.subject import Subject
from stabilitykit.models.transformers import HuggingFaceModel
from stabilitykit.recorder.names import site_path
from stabilitykit.records.scaling import Scaling
from stabilitykit.remedies.original import Original
from stabilitykit.remedies.places import stacks
from stabilitykit.remedies.samples import Inputs
from stabilitykit.run.case import Progress
from stabilitykit.scaling.blueprint import Blueprint
from stabilitykit.scaling.explain import obstacles
from stabilitykit.scaling.exponents import Expression
from stabilitykit.scaling.look import Traced, look
from stabilitykit.scaling.program import Solution
from stabilitykit.scaling.shadows import values
from stabilitykit.scaling.subjects import blueprint_of, continued
from stabilitykit.scaling.trace import Run

_TRACED = 24  # tokens of the text that is traced


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`before` is the largest value that float16 has to store, and where it is; `after` the same of the scaled model.

    `shortfall` is by how many bits the margin is missed, `obstacles` are sentences that say why. An `exact` scaling
    keeps the function; where there is none that fits, `approximate` is one that gives up what matters little.
    """

    exact: Scaling
    before: tuple[float, str]
    after: tuple[float, str]
    shortfall: float
    obstacles: tuple[str, ...]
    residual: int | None
    approximate: Scaling | None


def choose(
    original: Original, subject: Subject, inputs: Sequence[Inputs], margin: float, progress: Progress | None = None
) -> Choice:
    """The scaling for `original`, which `subject` is in float32, as run on `inputs`.

    Raises MisuseError where a parameter takes no part in any of these runs.
    """

    def announce(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(what, done, total)

    low = original.open("bfloat16").module
    runs = [continued(one, steps=0) for one in inputs]
    blueprint = _blueprint(subject)
    try:
        traced = look(subject.module, low, [_beginning(inputs[0]), *runs], blueprint, announce=announce)
    except MisuseError:  # a short run may leave out an expert
        traced = look(subject.module, low, [_one_by_one(runs)], blueprint, announce=announce)
    announce("choosing", 0, 1)
    solution = traced.solve(margin=margin)
    over = max((one.bits for one in solution.short), default=0.0)
    nearly = traced.solve(margin=margin, soft=True) if over > margin else None
    fits = nearly is not None and max((one.bits for one in nearly.short), default=0.0) <= margin
    return Choice(
        exact=solution.scaling,
        before=_largest(traced, lambda expression: 0),
        after=_largest(traced, partial(solution.of, traced.graph)),
        shortfall=over,
        obstacles=obstacles(traced, solution, margin),
        residual=_residual(traced, solution, subject.module),
        approximate=nearly.scaling if nearly is not None and fits else None,
    )


def _largest(traced: Traced, exponent: Callable[[Expression], int]) -> tuple[float, str]:
    """The largest value, each a power of two times what was measured, and where it is."""
    found = ((peak * 2.0 ** exponent(expression), site) for expression, (peak, site) in traced.peaks.items())
    peak, site = max(found, default=(0.0, ""))
    module, _, operator = site.rpartition("/")
    return peak, f"{site_path(module)}/{operator}"


def _residual(traced: Traced, solution: Solution, module: nn.Module) -> int | None:
    """The exponent of the sums that layers make themselves; None where these differ, or make none."""
    layers = {name for name, one in module.named_modules() if any(one in list(stack) for stack in stacks(module))}
    found = {
        solution.of(traced.graph, expression)
        for site, stored in traced.graph.stored.items()
        if site.rpartition("/")[0] in layers and site.rpartition("/")[2].startswith("add.")
        for expression in values(stored.shadow)
    }
    return found.pop() if len(found) == 1 else None


def _blueprint(subject: Subject) -> Blueprint | None:
    """That of the model inside where an adapter is around it, with the paths that its modules have there."""
    if not isinstance(subject, HuggingFaceModel) or subject.causal is subject.module:
        return blueprint_of(subject.module)
    inner = blueprint_of(subject.causal)
    assert inner is not None  # of a model of transformers'

    def build(settings: Mapping[str, Any]) -> nn.Module:
        around, base = nn.Module(), nn.Module()
        around.base_model, base.model = base, inner.build(settings)
        return around

    return Blueprint(settings=inner.settings, build=build)


def _beginning(inputs: Inputs) -> Run:
    """The beginning of a text, and steps with a cache after it; inputs of other kinds whole."""
    texts = {name for name in inputs if name.endswith("input_ids")}
    if set(inputs) == texts:
        inputs = {name: one[:, :_TRACED] for name, one in inputs.items()}
    return continued(inputs)


def _one_by_one(runs: Sequence[Run]) -> Run:
    return lambda model: [run(model) for run in runs]
