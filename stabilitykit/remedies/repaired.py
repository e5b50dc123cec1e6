"""What a repair comes to."""

from collections.abc import Sequence
from dataclasses import dataclass

from stabilitykit.records.bounds import SiteBound
from stabilitykit.records.remedies import Ranking
from stabilitykit.remedies.rescale import Rescaled


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """The rescaled checkpoint, how it and the other remedies rank, and where it was proved its bounds."""

    rescaled: Rescaled
    ranking: Ranking
    bounds: Sequence[SiteBound] = ()

    @property
    def finite(self) -> bool:
        """Whether the repaired checkpoint is finite in float16 on all held-out texts, and so may be written."""
        return self.ranking.repaired.finite
