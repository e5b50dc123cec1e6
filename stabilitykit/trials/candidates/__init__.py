"""The candidates: one file each, with a function that looks at a situation and offers what fits.

To add one, write a file here and enter its function below.
"""

from stabilitykit.trials.candidate import Offer
from stabilitykit.trials.candidates.attention import other_attention
from stabilitykit.trials.candidates.cache import plain_cache
from stabilitykit.trials.candidates.cast import casts
from stabilitykit.trials.candidates.eps import larger_eps
from stabilitykit.trials.candidates.factors import factors
from stabilitykit.trials.candidates.mask import half_minimum
from stabilitykit.trials.candidates.operator import wider_operator
from stabilitykit.trials.candidates.padding import without_padding
from stabilitykit.trials.candidates.ranked import ranked
from stabilitykit.trials.candidates.rescale import rescale

CANDIDATES: tuple[Offer, ...] = (
    rescale,
    factors,
    ranked,
    wider_operator,
    larger_eps,
    half_minimum,
    without_padding,
    casts,
    plain_cache,
    other_attention,
)
