"""What was tried against a failure, on the very input that failed; written and read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

CLOSER = 2.0  # times: what rounding elsewhere may change by chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far what a run returned is from what float32 returns, over the `compared` rows that are finite in both.

    A row is what the last dimension of an output holds: the logits of a position, or its hidden state. `kl` is the KL
    divergence from float32's next-token distribution [nats a row], None where no logits were returned. `error` is the
    largest difference in a row, in parts of the largest magnitude that float32 returned: its mean over the rows, and
    its maximum. `rows` counts all rows, those too that are not finite. `top1` is the share of rows with the same most
    likely token.
    """

    rows: int
    compared: int
    error_mean: float | None
    error_max: float | None
    kl_mean: float | None = None
    kl_max: float | None = None
    top1: float | None = None

    def is_farther(self, other: "Distance") -> bool:
        """Whether on average, or at most, this is more than `CLOSER` times as far; what either has not counts not."""
        measures = (
            (self.error_max, other.error_max),
            (self.error_mean, other.error_mean),
            (self.kl_mean, other.kl_mean),
        )
        return any(a is not None and b is not None and a > CLOSER * b for a, b in measures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One change, and what the failing run came to with it.

    `finite`: every number that was returned is, and nothing was raised. `cured`: that, and what was returned is as
    close to float32's as a 16-bit format comes. `distance` is over all rows, `concerned` over those in which plain
    float16 was lost or wrong. `then` is a sentence on what overflowed with the change, or what was raised.
    `cures_whole`: whether it cures the whole input, too, of which a part was diagnosed; None where that was not tried.
    `memory` is in bytes beyond a plain run. `carried`: weights and settings say it all, so that a folder can carry it.
    `command` is what does it: a command line, or lines of Python.
    """

    name: str
    summary: str
    dtype: str
    finite: bool
    cured: bool
    distance: Distance | None
    concerned: Distance | None
    then: str
    memory: int
    carried: bool
    command: str
    cures_whole: bool | None = None

    @property
    def is_format(self) -> bool:
        """Whether it is another dtype for everything, and nothing else."""
        return self.name == self.dtype

    @property
    def far(self) -> float:
        """KL where there is one, else the error; infinite where nothing could be compared."""
        one = self.distance
        if one is None or one.compared == 0:
            return float("inf")
        found = one.kl_mean if one.kl_mean is not None else one.error_max
        return float("inf") if found is None else found


@dataclass(frozen=True, slots=True, kw_only=True)
class Harm:
    """What an overflow that was absorbed did to the output.

    `plain` is the distance of the run as it is, `without` that with the operator at `site` in float32 alone, both of
    the outputs that are worse for it, or else of all; `harmful` whether that operator is what makes it wrong. `rows`
    are the worst (call, row, position), with their errors, in parts of float32's largest magnitude.
    """

    site: str
    harmful: bool
    plain: Distance
    without: Distance | None
    rows: tuple[tuple[int, int, int | None, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """One way to run the same model that rounds elsewhere: how far it is from the plain run, and from float32.

    `same_tokens` is the share of tokens that are the same as the plain run's: of those that were generated, else of
    those that each row of logits makes likeliest. `margin`: where one is not, the difference between the plain run's
    two largest logits, the least of all; None where all are the same.
    """

    name: str
    distance: Distance
    wide: Distance
    same_tokens: float | None = None
    margin: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Smallest:
    """The smallest input found that fails alike: the `tokens` of each row, what is left of how many, and in how many
    runs. `minimal`: without any one of its tokens the break is gone, or another one.
    """

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...] | None
    before: int
    runs: int
    minimal: bool
    site: str
    kind: str
    label: str | None

    @property
    def after(self) -> int:
        """How many tokens are left."""
        return sum(map(len, self.tokens))

    @property
    def is_smaller(self) -> bool:
        """Whether any could be left out."""
        return self.after < self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """A failure, and what cures it: `trials`, the best first.

    `diagnosed` says which input all of it is about: the whole one, or the `smallest` that fails alike.
    `verdict` is what the records of the run in `dtype` say, `findings` the same as `stabilitykit profile --json` prints
    it. `plain` is the distance of that run from float32. `left_out` says, by its name, why a candidate does not apply.
    `advice` is one paragraph.
    """

    source: str | None
    dtype: str
    verdict: str
    advice: str
    finite: bool
    plain: Distance | None
    trials: tuple[Trial, ...] = ()
    harm: Harm | None = None
    rounding: tuple[Rounding, ...] = ()
    smallest: Smallest | None = None
    diagnosed: Literal["whole", "smallest"] = "whole"
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    findings: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None
    schema: int = 1

    def __getitem__(self, name: str) -> Trial:
        """Raises KeyError for what was not tried."""
        return {trial.name: trial for trial in self.trials}[name]

    @property
    def is_well(self) -> bool:
        """Whether everything is finite, and nothing that overflowed on the way did any harm."""
        return self.finite and (self.harm is None or not self.harm.harmful)

    @property
    def cures(self) -> tuple[Trial, ...]:
        """The trials that cure it, the best first."""
        return tuple(trial for trial in self.trials if trial.cured)
