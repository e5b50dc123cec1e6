"""What a gate decided about a model, and the baseline that later decisions are compared with; without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stabilitykit.records.provenance import Provenance
from stabilitykit.records.record import StoredWeights

LimitName = Literal["weights", "range", "output", "headroom", "kl", "baseline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What has to hold. Without the first two, nothing may leave the range.

    `min_headroom` are the bits that every stored tensor keeps below the dtype's maximum. `max_kl` is the mean KL
    divergence from float32's next-token distribution, in nats a token, of each prompt. `tolerance` are the bits that a
    site may lose against a baseline.
    """

    min_headroom: float | None = None
    max_kl: float | None = None
    tolerance: float = 0.5

    @property
    def keeps_range(self) -> bool:
        """Whether nothing may leave the range, whatever comes out; False where only what comes out is limited."""
        return self.max_kl is None or self.min_headroom is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteHeadroom:
    """The least headroom that a tensor had in any prompt: `headroom` bits at the magnitude `amax`, inf for all zeros.

    Past the range it is negative: of the value that overflowed, -inf where that is not finite or not known. `prompt`,
    `position` and `token` say where; None where it is not known.
    """

    site: str
    label: str | None
    layer: int | None
    amax: float
    headroom: float
    prompt: str
    position: int | None = None
    token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPrompt:
    """One prompt, or one file of tensors, that ran.

    `sha256` is that of what the model was given, `tokens` how many those are in all. `every_length`: what is said holds
    for every shorter length too, as was checked; `first_broken` is the shortest of these at which something leaves the
    range. `headroom` is the least of all sites', at `site`. `kl_mean` and `kl_max` are in nats a token, over `compared`
    of `positions`; None where nothing was compared.
    """

    name: str
    sha256: str
    tokens: int | None
    every_length: bool = False
    first_broken: int | None = None
    headroom: float | None = None
    site: str | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    compared: int = 0
    positions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A limit that does not hold, with its numbers: `value` where at least, or at most, `bound` was asked for.

    `site` is a tensor, or a weight's name; `prompts` are those in which it happens, the worst first; none of a weight.
    `text` says it in a sentence or more.
    """

    limit: LimitName
    text: str
    site: str | None = None
    label: str | None = None
    layer: int | None = None
    value: float | None = None
    bound: float | None = None
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What is not as it was when the baseline was written: a version, the weights' SHA-256, the machine."""

    what: str
    before: str
    now: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate(Provenance):
    """What `stabilitykit check` found: it holds where there is no violation.

    `weights` is what storing the checkpoint in `dtype` does to it. Where that violates, or where only weights were
    asked for, `ran` is False and nothing else is filled. `headroom` is ordered from the least to the most.
    `compared`: with a baseline, from whose versions `differences` are those. `remarks` say what the result does not
    cover.
    """

    derived = ("holds",)

    dtype: str
    limits: Limits
    weights: StoredWeights | None
    violations: tuple[Violation, ...] = ()
    ran: bool = True
    prompts: tuple[CheckedPrompt, ...] = ()
    headroom: tuple[SiteHeadroom, ...] = ()
    compared: bool = False
    differences: tuple[Difference, ...] = ()
    remarks: tuple[str, ...] = ()
    schema: int = 1

    @property
    def holds(self) -> bool:
        """Whether no limit is violated."""
        return not self.violations


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline(Provenance):
    """The headroom of every site when a check held, in bits of `dtype`, and the SHA-256 of each prompt by its name."""

    dtype: str
    headroom: Mapping[str, float]
    prompts: Mapping[str, str] = field(default_factory=dict)
    schema: int = 1
