"""Weights that float32 holds and float16 does not: a power of two moved out of them, to what reads their result."""

import math
from collections.abc import Iterator, Mapping

from torch import nn

from stabilitykit.formats import FLOAT16
from stabilitykit.recorder.names import site_path
from stabilitykit.records.scaling import UNCHANGED, Factor, Scaling
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import Situation
from stabilitykit.words import listed, number

_NAMES = {
    "up_proj": ("down_proj", "up and down factors"),
    "wi_1": ("wo", "up and down factors"),
    "w3": ("w2", "up and down factors"),
    "v_proj": ("o_proj", "value and output factors"),
}
"""Layers whose result another one multiplies, with nothing between them that is not linear; and what that is called."""


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
        name=_NAMES[worst.split(".")[-2]][1],
        summary=told(site_path(worst), past[worst], scaling),
        command=lines(scaling),
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
        after = f"{parent}.{_NAMES[layer][0]}.weight" if layer in _NAMES else ""
        if kind not in ("weight", "bias") or after not in held or after in past:
            stuck.append(name)
            continue
        k = max(1, math.ceil(-FLOAT16.headroom(largest)))
        k = max(k, -factors.get(f"{path}.weight", Factor(exponents=(0,))).exponents[0])
        factors |= {one: Factor(exponents=(-k,)) for one in (f"{path}.weight", f"{path}.bias") if one in held}
        factors[after] = Factor(exponents=(k,))
    return Scaling(parameters=factors), tuple(stuck)


def told(what: str, largest: float, scaling: Scaling) -> str:
    """What overflows, and what is multiplied by what."""
    changes = [f"{site_path(path)} by 2^{one.exponents[0]}" for path, one in scaling.parameters.items()]
    return (
        f"{what} reaches {number(largest)} in float32, which float16 does not hold. Multiplies {listed(changes, 4)} "
        "before they are rounded: their result stays."
    )


def lines(scaling: Scaling) -> str:
    return "\n".join(
        f"model.get_parameter({path!r}).data *= 2.0**{one.exponents[0]}  # in float32"
        for path, one in scaling.parameters.items()
    )
