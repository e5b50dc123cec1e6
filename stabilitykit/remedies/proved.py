"""A scaling of Gemma 1, 2 or 3 chosen from bounds instead of peaks, so that no prompt can overflow float16.

Bounds scale with the tensors: by γ for whatever a norm reads, by 1 / γ for the final norm's output, and by each layer's
β for what lies between its `up_proj` and `down_proj`. All other bounds must be within float16's range already.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stabilitykit.bounds import bound_sites
from stabilitykit.checkpoints import Checkpoint, GemmaConfig
from stabilitykit.errors import MisuseError
from stabilitykit.records.bounds import SiteBound
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.remedies.original import scaled_checkpoint
from stabilitykit.run.case import Progress
from stabilitykit.scaling.stress import check_gamma, stress_of_gemma

_SMALLEST = 2.0**-24  # γ and β
_SHARE = 0.95  # of the maximum may be used, so that a checker whose bounds are some percent coarser agrees

Reach = Literal["gamma", "inverse", "inner", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """A scaling, and the bounds of the scaled checkpoint, all at most 95% of the float16 maximum."""

    scaling: Scaling
    bounds: Sequence[SiteBound]


def prove(checkpoint: Checkpoint, *, progress: Progress | None = None) -> Proved:
    """The scaling with the largest γ and β for which every bound is within float16's range.

    Raises MisuseError where there is none, and names the tensor that prevents it and the way out.
    """
    gamma, inner = choose_factors(bound_sites(checkpoint, "float16", progress=progress), checkpoint.config)
    scaling = by_norms(checkpoint, gamma, inner)
    bounds = bound_sites(scaled_checkpoint(checkpoint, scaling), "float16", progress=progress)
    over = [one for one in bounds if not one.bound <= _SHARE * one.limit]
    if over:  # what subnormals add does not scale
        raise MisuseError(_unprovable(over[0], f"scaled by {gamma:g}"))
    return Proved(scaling=scaling, bounds=bounds)


def by_norms(checkpoint: Checkpoint, gamma: float, inner: Sequence[float] = ()) -> Scaling:
    """What every norm reads times `gamma`, eps times γ², and what lies between `up_proj` and `down_proj` times `inner`,
    by layer: powers of two from 2^-24 to 2^24.
    """
    found = stress_of_gemma(checkpoint.config, gamma)
    parameters = dict(found.parameters)
    for layer, beta in enumerate(inner):
        for leaf, times in (("up_proj", 1), ("down_proj", -1)):
            name = f"layers.{layer}.mlp.{leaf}.weight"
            (before,) = parameters.pop(name).exponents if name in parameters else (0,)
            exponent = before + times * check_gamma(beta)
            if exponent:
                parameters[name] = Factor(exponents=(exponent,))
    return Scaling(parameters=parameters, settings=found.settings)


def choose_factors(bounds: Sequence[SiteBound], config: GemmaConfig) -> tuple[float, tuple[float, ...]]:
    """γ, and β by layer, from the bounds of the checkpoint before it is scaled."""
    by_reach: dict[Reach, list[SiteBound]] = {"gamma": [], "inverse": [], "inner": [], "none": []}
    for one in bounds:
        by_reach[reach(one.kind, config)].append(one)
    for one in by_reach["none"]:
        if not one.bound <= _SHARE * one.limit:
            raise MisuseError(_unprovable(one, "which neither γ nor β scales"))
    largest = max(by_reach["gamma"], key=lambda one: one.bound)
    (final,) = by_reach["inverse"]
    gamma = _largest_power(largest)
    if final.bound / gamma > _SHARE * final.limit:
        table = 2 * config.vocabulary * config.hidden_size
        raise MisuseError(
            f"No proved repair exists: every bound must be at most {_SHARE * final.limit:,.0f}. {largest.site} may "
            f"reach {largest.bound:,.0f} and needs γ = {gamma:g}, but the final norm grows by 1 / γ, from "
            f"{final.bound:,.0f} to {final.bound / gamma:,.0f}, because the head is tied to the embedding. A separate "
            f"head would avoid that, for {table / 2**20:,.0f} MiB more. Without --proved, a repair is chosen by "
            "measured values."
        )
    inner = [1.0] * config.layers
    for one in by_reach["inner"]:
        assert one.layer is not None
        inner[one.layer] = min(inner[one.layer], _largest_power(one))
    return gamma, tuple(inner)


def reach(kind: str, config: GemmaConfig) -> Reach:
    """Which factor of `by_norms` scales the tensors of this kind, such as `layers.*.mlp.up_proj`."""
    if kind == "norm":
        return "inverse"
    if kind in ("layers.*.mlp.up_proj", "layers.*.mlp/mul.0"):
        return "inner"
    scaled = {"embed_tokens", "embed_tokens/embedding.0", "layers.*", "layers.*/add.0"}
    scaled |= {"layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"}
    if config.post_norms:
        scaled |= {"layers.*.post_attention_layernorm", "layers.*.post_feedforward_layernorm"}
    if config.query_key_norm:
        scaled |= {"layers.*.self_attn.q_proj", "layers.*.self_attn.k_proj"}
    return "gamma" if kind in scaled else "none"


def _largest_power(one: SiteBound) -> float:
    """The largest power of two up to 1 that brings the bound within 95% of the maximum, but at least 2^-24."""
    if one.bound <= _SHARE * one.limit:
        return 1.0
    if not math.isfinite(one.bound):
        return _SMALLEST
    return max(_SMALLEST, 2.0 ** math.floor(math.log2(_SHARE * one.limit / one.bound)))


def _unprovable(one: SiteBound, why: str) -> str:
    label = f" ({one.label})" if one.label else ""
    return (
        f"No proved repair exists: every bound must be at most {_SHARE * one.limit:,.0f}, and {one.site}{label}, "
        f"{why}, may reach {one.bound:,.0f}. Without --proved, a repair is chosen by measured values."
    )
