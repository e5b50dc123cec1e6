"""What no prompt can make a tensor exceed, site by site; written and read without torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from stabilitykit.formats import number_format
from stabilitykit.records.provenance import CheckpointProvenance

Verdict = Literal["safe for every prompt", "reachable by a prompt", "reachable by a hidden state", "open"]


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest magnitude of a site, and what made it: words for a place in a prompt, or a hidden state [E]."""

    value: float
    prompt: str | None = None
    state: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteBound:
    """What is known of the magnitudes at one site, as stored in `dtype`.

    `bound`: no prompt of any length exceeds it; inf where float64 does not hold it. `observed`: the largest in prompts
    that were run. `found`: the largest that a hidden state makes of this layer's own weights, which is weaker than a
    prompt: nobody said that a prompt leads to that state. None where nothing was run, and `found` of the residual
    stream, which is the hidden state itself. `prompt` says where in which prompt the end was passed, and `state` is
    the vector, entering the layer's norm, that passes it; each only where one does.
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

    @property
    def kind(self) -> str:
        """The site with `*` for the layer."""
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
    """`bounds` with the largest magnitudes by site, of hidden states or of prompts; None where `largest` has none."""
    entered = []
    for one in bounds:
        seen = largest.get(one.site)
        value = None if seen is None else seen.value
        passes = seen is not None and number_format(one.dtype).overflows(seen.value)
        if field == "found":
            entered.append(replace(one, found=value, state=seen.state if seen is not None and passes else None))
        else:
            entered.append(replace(one, observed=value, prompt=seen.prompt if seen is not None and passes else None))
    return entered


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds(CheckpointProvenance):
    """All of a checkpoint's, in order of execution, and where they come from."""

    dtype: str
    sites: tuple[SiteBound, ...]
    schema: int = 1
