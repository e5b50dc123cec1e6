"""The scaling that keeps a model finite in float16 on the inputs that choose, or what stands in its way."""

import math
from dataclasses import dataclass

from stabilitykit.formats import FLOAT16
from stabilitykit.records.scaling import Scaling
from stabilitykit.remedies.original import GemmaOriginal, Original
from stabilitykit.remedies.proved import by_norms
from stabilitykit.remedies.seen import Seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    scaling: Scaling
    shortfall: float = 0.0
    obstacles: tuple[str, ...] = ()


def choose(original: Original, seen: Seen, margin: float) -> Choice:
    bits = max(0, math.ceil(margin - FLOAT16.headroom(seen.peak)))
    assert isinstance(original, GemmaOriginal)
    return Choice(scaling=by_norms(original.checkpoint, 2.0**-bits))
