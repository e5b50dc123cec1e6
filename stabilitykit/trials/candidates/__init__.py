"""The candidates: one file each, with a function that looks at a situation and offers what fits.

To add one, write a file here and enter its function below.
"""

from stabilitykit.trials.candidate import Offer
from stabilitykit.trials.candidates.attention import other_attention
from stabilitykit.trials.candidates.cache import plain_cache
from stabilitykit.trials.candidates.cast import casts
from stabilitykit.trials.candidates.eps import larger_eps
from stabilitykit.trials.candidates.factors import factors
from stabilitykit.trials.candidates.labels import counting_label
from stabilitykit.trials.candidates.large_weights import large_weights
from stabilitykit.trials.candidates.mask import half_minimum
from stabilitykit.trials.candidates.merged import merged
from stabilitykit.trials.candidates.operator import wider_operator
from stabilitykit.trials.candidates.padding import without_padding
from stabilitykit.trials.candidates.ranked import ranked
from stabilitykit.trials.candidates.replaced import replaced_input, replaced_weight
from stabilitykit.trials.candidates.rescale import rescale
from stabilitykit.trials.candidates.sampled import sampled
from stabilitykit.trials.candidates.wide_weight import wide_weight
from stabilitykit.trials.candidates.zero_filled import zero_filled

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
    merged,
    large_weights,
    wide_weight,
    replaced_weight,
    replaced_input,
    zero_filled,
    counting_label,
    sampled,
)
