"""What an overflow that ended on the way did to what is returned, and whether it is the overflow that did it."""

from collections.abc import Callable, Iterator

from stabilitykit.records.trials import Distance, Harm
from stabilitykit.trials.answers import Answers
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.candidates.operator import wider_operator
from stabilitykit.trials.candidates.ranked import islands
from stabilitykit.trials.compare import Compared, Row
from stabilitykit.trials.situation import Situation

_WORST = 8  # rows
_LEAST, _LEAST_KL = 2.0**-9, 1e-4  # in parts of the largest number, and in nats: what rounding alone comes to


def without_overflow(situation: Situation, attempt: Callable[[Candidate], Compared]) -> Compared | None:
    """The same run with the operator that overflowed in float32, or with all that overflows: whichever is closer.

    None where neither can be, or neither is finite.
    """
    found = [attempt(one) for one in _wider(situation)]
    whole = [one for one in found if one.error and not one.lost()]
    return min(whole, key=lambda one: _far(one.distance()), default=None)


def _wider(situation: Situation) -> Iterator[Candidate]:
    yield from wider_operator(situation)
    if situation.overflowing and situation.reproduction.dtype == "float16":
        yield islands(situation)


def _far(one: Distance) -> float:
    return (one.error_max or 0.0) if one.kl_mean is None else one.kl_mean


def harmed(situation: Situation, low: Compared, without: Compared | None, tolerance: float) -> set[Row]:
    """The rows of a finite run that an overflow on the way made worse; none where the records show that it cannot have.

    Those of outputs that are much closer to float32 without it, and farther than rounding is. Where there is no such
    run, as with a weight that is infinite, those that are farther from float32 than `tolerance`, in parts of the
    largest magnitude.
    """
    if situation.found is None or situation.found.harmless:
        return set()
    if without is not None:
        farther = low.farther_than(without)
        return {row for row in farther if low.error[row] > _LEAST or low.kl.get(row, 0.0) > _LEAST_KL}
    return {row for row, error in low.error.items() if error > tolerance}


def harm(situation: Situation, low: Compared, plain: Answers, without: Compared | None, rows: set[Row]) -> Harm | None:
    """Of a run that returned finite numbers, of which `rows` were harmed; None where nothing broke on their way."""
    if situation.found is None or situation.found.broke.is_gradient:
        return None
    worst = sorted(rows or low.error, key=lambda row: -low.error[row])[:_WORST]
    outputs = {number for number, _ in rows or low.error}
    told = {row for row in low.error if row[0] in outputs}
    return Harm(
        site=situation.found.broke.site,
        harmful=bool(rows),
        plain=low.distance(told),
        without=None if without is None else without.distance(told),
        rows=tuple((row[0], *plain.outputs[row[0]].place(row[1]), low.error[row]) for row in worst),
    )
