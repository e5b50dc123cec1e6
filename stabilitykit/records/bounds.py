"""Bounds that no prompt can exceed, site by site; written and read without torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from stabilitykit.formats import number_format
from stabilitykit.records.provenance import CheckpointProvenance

Verdict = Literal["safe for every prompt", "reachable by a prompt", "reachable by a hidden state", "open"]


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest magnitude of a site, and what led to it: a position in a prompt, in words, or a hidden state [E]."""

    value: float
    prompt: str | None = None
    state: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteBound:
    """What is known of the magnitudes at one site, as stored in `dtype`.

    `bound`: no prompt of any length exceeds it; inf where it overflows float64, and where there is none: `unbounded`
    says why then. `observed`: the largest magnitude in
    the prompts that were run. `found`: the largest that a hidden state leads to with this layer's weights, which is
    weaker evidence, as no prompt may lead to that state. Both are None where nothing was run, and `found` for the
    residual stream, which is the hidden state itself, and for decoders that the kit has no model of its own of.
    `prompt` says where in which prompt the dtype overflowed, and
    `state` is a vector that makes it overflow when it enters the layer's norm; None where there is none.
    """

    derived: ClassVar[tuple[str, ...]] = ("limit", "verdict")

    site: str
    label: str | None
    layer: int | None
    dtype: str
    bound: float
    observed: float | None = None
    found: float | None = None
    prompt: str | None = None
    state: tuple[float, ...] | None = None
    unbounded: str | None = None

    @property
    def kind(self) -> str:
        """The kind of tensor: the site with `*` for the layer."""
        return re.sub(r"^layers\.\d+", "layers.*", self.site)

    @property
    def limit(self) -> float:
        """The dtype's largest finite value."""
        return number_format(self.dtype).largest

    @property
    def verdict(self) -> Verdict:
        form = number_format(self.dtype)
        if self.observed is not None and form.overflows(self.observed):
            return "reachable by a prompt"
        if self.found is not None and form.overflows(self.found):
            return "reachable by a hidden state"
        return "safe for every prompt" if self.bound <= form.largest else "open"


def with_largest(
    bounds: Sequence[SiteBound], field: Literal["found", "observed"], largest: Mapping[str, Largest]
) -> list[SiteBound]:
    """`bounds` with `field` set to the largest magnitude at each site; None where `largest` has none."""
    entered = []
    for one in bounds:
        seen = largest.get(one.site)
        value = None if seen is None else seen.value
        overflows = seen is not None and number_format(one.dtype).overflows(seen.value)
        if field == "found":
            entered.append(replace(one, found=value, state=seen.state if seen is not None and overflows else None))
        else:
            entered.append(replace(one, observed=value, prompt=seen.prompt if seen is not None and overflows else None))
    return entered


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds(CheckpointProvenance):
    """All bounds of a checkpoint, in order of execution, and their provenance."""

    dtype: str
    sites: tuple[SiteBound, ...]
    schema: int = 1
