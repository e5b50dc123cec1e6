"""Weights that float32 holds and float16 does not: a power of two moved out of them, to what reads their result."""

import math
from collections.abc import Iterator, Mapping

from torch import nn

from stabilitykit.diagnosis.projections import DOWN, OUTPUTS, PROJECTIONS
from stabilitykit.formats import FLOAT16
from stabilitykit.recorder.names import site_path
from stabilitykit.records.scaling import UNCHANGED, Factor, Scaling
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.multiplied import lines, told
from stabilitykit.trials.situation import Situation
from stabilitykit.words import number

_READ_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    **{up: ("up and down factors", (down,)) for up, down in DOWN.items()},
    **dict.fromkeys(PROJECTIONS["value"], ("value and output factors", OUTPUTS)),
}
"""Layers whose result another one multiplies, with nothing between them that is not linear: what that is called, and
the names that the other one may have.
"""


def large_weights(situation: Situation) -> Iterator[Candidate]:
    """Where weights overflow float16, and the float32 originals are known."""
    if situation.kind != "weight" or situation.reproduction.dtype != "float16":
        return
    wide = situation.models.model("float32")
    if hasattr(wide, "merge_and_unload"):  # it has an adapter of its own
        return
    past = past_maximum(wide)
    scaling, stuck = moved(wide, past)
    if scaling == UNCHANGED or stuck:
        return
    worst = max(past, key=lambda one: past[one])
    yield Candidate(
        name=_READ_BY[worst.split(".")[-2]][0],
        summary=said(site_path(worst), past[worst], scaling),
        command=in_float32(scaling),
        scaling=scaling,
        carried=True,
    )


def past_maximum(wide: nn.Module) -> dict[str, float]:
    """The largest magnitude of each parameter that overflows float16, by name."""
    sizes = {
        name: float(one.detach().abs().max())
        for name, one in wide.named_parameters()
        if one.is_floating_point() and one.numel()
    }
    return {name: size for name, size in sizes.items() if math.isfinite(size) and FLOAT16.overflows(size)}


def moved(wide: nn.Module, past: Mapping[str, float]) -> tuple[Scaling, tuple[str, ...]]:
    """Powers of two that bring these parameters into range, and those for which there is none."""
    held = dict(wide.named_parameters())
    factors: dict[str, Factor] = {}
    stuck = []
    for name, largest in past.items():
        path, _, kind = name.rpartition(".")
        parent, _, layer = path.rpartition(".")
        readers = [f"{parent}.{one}.weight" for one in _READ_BY[layer][1]] if layer in _READ_BY else []
        after = next((one for one in readers if one in held), "")
        if kind not in ("weight", "bias") or not after or after in past:
            stuck.append(name)
            continue
        k = max(1, math.ceil(-FLOAT16.headroom(largest)))
        k = max(k, -factors.get(f"{path}.weight", Factor(exponents=(0,))).exponents[0])
        factors |= {one: Factor(exponents=(-k,)) for one in (f"{path}.weight", f"{path}.bias") if one in held}
        factors[after] = Factor(exponents=(k,))
    return Scaling(parameters=factors), tuple(stuck)


def said(what: str, largest: float, scaling: Scaling) -> str:
    """What overflows, and what is multiplied by what."""
    return (
        f"{what} reaches {number(largest)} in float32, which float16 does not hold. Multiplies "
        f"{told(scaling.parameters, 4)} before they are rounded: their result stays."
    )


def in_float32(scaling: Scaling) -> str:
    return "\n".join(f"{line}  # in float32" for line in lines(scaling.parameters))
