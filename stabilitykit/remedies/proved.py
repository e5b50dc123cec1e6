"""A rescale chosen from bounds instead of peaks, so that no prompt of any length can leave float16's range.

Bounds scale as the tensors do: γ scales whatever a norm reads, 1 / γ the final norm's output, and β of each layer what
stands between its `up_proj` and `down_proj`. What none of them reaches must fit as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stabilitykit.bounds import bound_sites
from stabilitykit.checkpoints import Checkpoint, GemmaConfig
from stabilitykit.errors import MisuseError
from stabilitykit.records.bounds import SiteBound
from stabilitykit.remedies.rescale import Rescaled, rescale
from stabilitykit.run.case import Progress

_LEAST = 24  # of γ and β, in powers of two
_ROOM = 0.95  # of the limit is asked for, so that a checker that is coarser by some percent comes to the same

Reach = Literal["gamma", "inverse", "inner", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """A rescaled checkpoint, and its own bounds, all of them within float16's range, by a twentieth of it."""

    rescaled: Rescaled
    bounds: Sequence[SiteBound]


def prove(checkpoint: Checkpoint, *, progress: Progress | None = None) -> Proved:
    """The rescale with the largest γ and β for which every bound lies within float16's range.

    Raises MisuseError where there is none, and says which tensor stands in the way and what would help.
    """
    gamma, inner = choose_factors(bound_sites(checkpoint, "float16", progress=progress), checkpoint.config)
    rescaled = rescale(checkpoint, gamma, inner)
    bounds = bound_sites(rescaled.checkpoint, "float16", progress=progress)
    over = [one for one in bounds if not one.bound <= _ROOM * one.limit]
    if over:  # what subnormals add does not scale
        raise MisuseError(_standing_in_the_way(over[0], f"scaled by {gamma:g}"))
    return Proved(rescaled=rescaled, bounds=bounds)


def choose_factors(bounds: Sequence[SiteBound], config: GemmaConfig) -> tuple[float, tuple[float, ...]]:
    """γ, and β by layer, from the bounds of a checkpoint as it is."""
    by_reach: dict[Reach, list[SiteBound]] = {"gamma": [], "inverse": [], "inner": [], "none": []}
    for one in bounds:
        by_reach[reach(one.kind, config)].append(one)
    for one in by_reach["none"]:
        if not one.bound <= _ROOM * one.limit:
            raise MisuseError(_standing_in_the_way(one, "which no power of two between two norms reaches"))
    largest = max(by_reach["gamma"], key=lambda one: one.bound)
    (final,) = by_reach["inverse"]
    gamma = _largest_power(largest)
    if final.bound / gamma > _ROOM * final.limit:
        table = 2 * config.vocabulary * config.hidden_size
        raise MisuseError(
            f"A proved repair brings every bound under {_ROOM * final.limit:,.0f}. {largest.site} may reach "
            f"{largest.bound:,.0f} and needs a factor of {gamma:g}, by whose inverse the final norm grows, "
            f"from {final.bound:,.0f} to {final.bound / gamma:,.0f}, for the head is the embedding. A head of its own "
            f"would take it out of the way, for {table / 2**20:,.0f} MiB more. Without --proved a repair goes by what "
            "was measured."
        )
    inner = [1.0] * config.layers
    for one in by_reach["inner"]:
        assert one.layer is not None
        inner[one.layer] = min(inner[one.layer], _largest_power(one))
    return gamma, tuple(inner)


def reach(kind: str, config: GemmaConfig) -> Reach:
    """Which factor scales the tensors of a kind, `layers.*.mlp.up_proj` for example, under `rescale`."""
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
    """The largest power of two up to 1 that brings the bound under the limit; 2^-24 where that is not enough."""
    if one.bound <= _ROOM * one.limit:
        return 1.0
    if not math.isfinite(one.bound):
        return 2.0**-_LEAST
    return max(2.0**-_LEAST, 2.0 ** math.floor(math.log2(_ROOM * one.limit / one.bound)))


def _standing_in_the_way(one: SiteBound, why: str) -> str:
    label = f" ({one.label})" if one.label else ""
    return (
        f"A proved repair brings every bound under {_ROOM * one.limit:,.0f}; {one.site}{label}, {why}, may reach "
        f"{one.bound:,.0f}. Without --proved the repair goes by what was measured."
    )
