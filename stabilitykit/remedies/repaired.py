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
        """Whether float16 holds the scaled model, which so may be written: all that it has to store of the choosing
        inputs, as float32 showed, and what it returns on all held-out ones. A value that overflows on the way may leave
        results that are finite and wrong.
        """
        score = self.ranking.repaired
        return self.ranking.scaled_headroom >= 0 and (score is None or score.finite)
