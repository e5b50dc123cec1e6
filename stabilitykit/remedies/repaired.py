"""What a repair comes to."""

from collections.abc import Sequence
from dataclasses import dataclass

from stabilitykit.records.bounds import SiteBound
from stabilitykit.records.remedies import Ranking
from stabilitykit.remedies.original import Original
from stabilitykit.remedies.samples import Samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """The model, what it was run on, how its scaling and the other remedies rank, and where it was proved the bounds of
    the scaled one.
    """

    original: Original
    samples: Samples
    ranking: Ranking
    bounds: Sequence[SiteBound] = ()

    @property
    def finite(self) -> bool:
        """Whether the scaled model is finite in float16 on all held-out inputs, and so may be written.

        Where nothing was ranked it is what float32 showed: whether all that float16 has to store is within its range.
        """
        score = self.ranking.repaired
        return self.ranking.scaled_headroom >= 0 if score is None else score.finite
