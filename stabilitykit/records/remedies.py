"""How the remedies of a checkpoint did, side by side; written and read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from stabilitykit.records.provenance import CheckpointProvenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How a remedy did over `positions` tokens. Numbers are None where no position was finite.

    `kl` (nats a token: mean, half the width of its 95% interval, 99th percentile, largest) is that of float32's
    next-token distribution from the remedy's; `top1` the share of positions with the same likeliest token;
    `perplexity` the relative change of the text's. `headroom` is the least, in bits of the remedy's dtype, over what it
    stores in the first windows; None where it is not finite. `weights` and `extra` are bytes: of the weights, and of
    what a window takes beside a plain run's activations. `time` is that of a plain float16 pass, times so much.
    `exportable`: a folder can carry it, with no code around the model.
    """

    name: str
    summary: str
    dtype: str
    exportable: bool
    finite: bool
    positions: int
    kl_mean: float | None
    kl_interval: float | None
    kl_p99: float | None
    kl_max: float | None
    top1: float | None
    perplexity: float | None
    headroom: float | None
    weights: int
    extra: int
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """How many weights float16 stores as subnormals, and how many it loses to zero."""

    subnormal: int
    zero: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking(CheckpointProvenance):
    """`scores` of a checkpoint's remedies, the best first, and how the rescale among them was chosen.

    `peak` is the largest value of the choosing texts that float16 would have to store, as float32 computes it, and
    `site` where it was; `gamma` the largest power of two that leaves `margin` bits above it, 1 where nothing has to be
    changed. Where it was `proved`, `gamma` and, by layer, `inner` between `up_proj` and `down_proj` are instead the
    largest for which no prompt can leave float16's range, and `measured` tells of the weights that `margin` alone asks
    for. `islands` are the sites that float16 could not hold. `gains_rounded` counts, by norm, gains that float32
    had to round. `before` and `after` tell of the float16 weights. `carried` is the name of the score of what a folder
    carries.
    """

    gamma: float
    margin: float
    peak: float
    site: str
    islands: tuple[str, ...]
    gains_rounded: Mapping[str, int]
    before: Small
    after: Small
    carried: str
    scores: tuple[Score, ...]
    inner: tuple[float, ...] = ()
    measured: Small | None = None
    schema: int = 1

    @property
    def proved(self) -> bool:
        return self.measured is not None

    def __getitem__(self, name: str) -> Score:
        """Raises KeyError for a remedy that was not ranked."""
        found = {score.name: score for score in self.scores}
        return found[name]

    @property
    def repaired(self) -> Score:
        """Of the checkpoint that a folder carries."""
        return self[self.carried]
