"""The scores of a checkpoint's remedies, side by side; written and read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from stabilitykit.records.provenance import CheckpointProvenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A remedy's score over `positions` tokens. Numbers are None where no position was finite.

    `kl` is the KL divergence of the remedy's next-token distribution from float32's [nats per token]: mean, half the
    width of its 95% confidence interval, 99th percentile and maximum. `top1` is the share of positions with the same
    most likely token, `perplexity` the relative change of the text's perplexity. `headroom` is the least over what the
    remedy stores in the first windows, in bits of its dtype; None where it is not finite. `weights` and `extra` are
    bytes: of the weights, and of what a window takes in addition to a plain run. `time` is relative to a plain float16
    pass. `exportable`: a folder can carry it, without code around the model.
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
    """How many weights float16 stores as subnormals, and how many it rounds to zero."""

    subnormal: int
    zero: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking(CheckpointProvenance):
    """`scores` of a checkpoint's remedies, the best first, and how the rescale among them was chosen.

    `peak` is the largest value that float16 would have to store on the choosing texts, as float32 computes it, and
    `site` where it was. `gamma` is the largest power of two that leaves `margin` bits of headroom, 1 where no rescale
    is needed. Where it was `proved`, `gamma` and, by layer, `inner` between `up_proj` and `down_proj` are instead the
    largest for which no prompt can overflow float16, and `measured` counts the small weights that `margin` alone would
    lead to. `islands` are the sites that overflow float16. `gains_rounded` counts, by norm, gains that float32 had to
    round. `before` and `after` count small float16 weights. `carried` names the score of what a folder carries.
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
        """The score of what a folder carries."""
        return self[self.carried]
