"""The scores of a checkpoint's remedies, side by side; written and read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stabilitykit.formats import FLOAT16
from stabilitykit.records.provenance import CheckpointProvenance
from stabilitykit.records.scaling import Scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A remedy's score over `positions` tokens, or rows of what the model returns. Numbers are None where no position
    was finite, and those of KL where the model returns no logits.

    `kl` is the KL divergence of the remedy's next-token distribution from float32's [nats per token]: mean, half the
    width of its 95% confidence interval, 99th percentile and maximum. `top1` is the share of positions with the same
    most likely token, `perplexity` the relative change of the text's perplexity. `headroom` is the least over what the
    remedy stores in the first windows, in bits of its dtype; None where it is not finite. `weights` and `extra` are
    bytes: of the weights, and of what a window takes in addition to a plain run. `time` is relative to a plain float16
    pass, None where none was timed. `exportable`: a folder can carry it, without code around the model. `error` is the
    largest difference from what float32 returns, in parts of the largest magnitude of that.
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
    time: float | None
    error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """How many weights float16 stores as subnormals, and how many it rounds to zero."""

    subnormal: int
    zero: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting of a model's config that a repair changes, such as `rms_norm_eps`, before and after it."""

    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a scaling does to a model's weights and settings.

    `moved` of the `parameters` are multiplied by powers of two, and so are the `settings`, by their keys in
    config.json, joined by dots. `gains_rounded` counts, by norm, gains that float32 had to round; `approximate` is the
    largest difference from what float32 returned before, in parts of the largest magnitude of that, None where every
    bit was kept. `before` and `after` count small float16 weights. `residual` is the exponent of the residual stream,
    None where layers differ or it is not known.
    """

    moved: int
    parameters: int
    settings: Mapping[str, Setting]
    gains_rounded: Mapping[str, int]
    before: Small
    after: Small
    approximate: float | None = None
    residual: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking(CheckpointProvenance):
    """`scores` of a model's remedies, the best first, and the `scaling` among them: none where nothing has to change.

    `peak` is the largest value that float16 has to store on the choosing inputs, as float32 computes it, `site` where
    it was, and `scaled_peak` and `scaled_site` the same of the scaled model. `margin` was asked for, in bits above
    that, and `shortfall` is how many of them could not be had. `obstacles` are sentences: what stands in the way of an
    exact scaling that leaves the margin. `islands` are the sites that overflow float16. `left_out` says, by its name,
    why a remedy does not apply. `carried` names the score of what a folder carries; there are no scores where nothing
    was ranked. Where it was `proved`, no prompt can overflow float16, and `measured` counts the small weights that
    `margin` alone would lead to.
    """

    margin: float
    peak: float
    site: str
    scaled_peak: float
    scaled_site: str
    scaling: Scaling
    change: Change
    islands: tuple[str, ...]
    carried: str
    scores: tuple[Score, ...]
    shortfall: float = 0.0
    obstacles: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    measured: Small | None = None
    schema: int = 2

    @property
    def scaled_headroom(self) -> float:
        """Bits from `scaled_peak` up to the maximum of float16."""
        return FLOAT16.headroom(self.scaled_peak)

    @property
    def proved(self) -> bool:
        return self.measured is not None

    def __getitem__(self, name: str) -> Score:
        """Raises KeyError for a remedy that was not ranked."""
        found = {score.name: score for score in self.scores}
        return found[name]

    @property
    def repaired(self) -> Score | None:
        """The score of what a folder carries; None where nothing was ranked."""
        return next((score for score in self.scores if score.name == self.carried), None)
