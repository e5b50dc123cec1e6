"""What no prompt can make a tensor exceed, site by site; written and read without torch."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from stabilitykit.formats import number_format

Verdict = Literal["safe for every prompt", "reachable by a prompt", "reachable by a hidden state", "open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteBound:
    """What is known of the magnitudes at one site, as stored in `dtype`.

    `bound`: no prompt of any length exceeds it; inf where float64 does not hold it. `observed`: the largest in prompts
    that were run. `found`: the largest that a hidden state makes of this layer's own weights, which is weaker than a
    prompt: nobody said that a prompt leads to that state. None where nothing was run, and `found` of the residual
    stream, which is the hidden state itself.
    """

    site: str
    label: str | None
    layer: int | None
    dtype: str
    bound: float
    observed: float | None = None
    found: float | None = None

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
    bounds: Sequence[SiteBound], field: Literal["found", "observed"], largest: Mapping[str, float]
) -> list[SiteBound]:
    """`bounds` with the largest magnitudes by site, of hidden states or of prompts; None where `largest` has none."""
    if field == "found":
        return [replace(one, found=largest.get(one.site)) for one in bounds]
    return [replace(one, observed=largest.get(one.site)) for one in bounds]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """All of a checkpoint's, in order of execution, and where they come from."""

    checkpoint: str
    sha256: str
    notes: tuple[str, ...]
    command: str
    dtype: str
    sites: tuple[SiteBound, ...]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    schema: int = 1

    def document(self) -> dict[str, Any]:
        """A bound that is infinite is None."""
        sites = [
            asdict(one)
            | {"bound": one.bound if math.isfinite(one.bound) else None, "limit": one.limit, "verdict": one.verdict}
            for one in self.sites
        ]
        return asdict(replace(self, sites=())) | {"sites": sites}

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "Bounds":
        """From what `document` gives."""
        return cls(**{**raw, "notes": tuple(raw["notes"]), "sites": tuple(_site(site) for site in raw["sites"])})


def _site(raw: dict[str, Any]) -> SiteBound:
    known = {key: value for key, value in raw.items() if key not in ("limit", "verdict")}
    return SiteBound(**(known | {"bound": math.inf if raw["bound"] is None else raw["bound"]}))
