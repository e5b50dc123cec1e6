"""When a repair may be written."""

import pytest
from scored import ranking, score

from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.records.remedies import Score
from stabilitykit.remedies.original import GemmaOriginal
from stabilitykit.remedies.repaired import Repair
from stabilitykit.remedies.samples import Samples


@pytest.mark.parametrize(
    ("peak", "scores", "fits"),
    [
        (25_000.0, (score("scaling", 2e-5),), True),
        (25_000.0, (score("scaling", None),), False),
        (70_000.0, (score("scaling", 2e-1),), False),  # absorbed on the way: finite, and wrong
        (70_000.0, (score("bfloat16", 1e-3),), False),
    ],
)
def test_it_is_finite_where_all_that_is_stored_fits_and_all_that_is_returned_is(
    peak: float, scores: tuple[Score, ...], fits: bool
) -> None:
    original = GemmaOriginal(random_checkpoint("random:gemma3-270m?layers=1&hidden_size=32&feed_forward=32&heads=2"))
    made = ranking(*scores, scaled_peak=peak)
    assert Repair(original=original, samples=Samples(choosing=(), held_out=()), ranking=made).finite == fits
