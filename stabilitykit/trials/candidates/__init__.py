"""The candidates: one file each, with a function that looks at a situation and offers what fits.

To add one, write a file here and enter its function below.
"""

from stabilitykit.trials.candidate import Offer
from stabilitykit.trials.candidates.eps import larger_eps
from stabilitykit.trials.candidates.factors import factors
from stabilitykit.trials.candidates.operator import wider_operator
from stabilitykit.trials.candidates.ranked import ranked
from stabilitykit.trials.candidates.rescale import rescale

CANDIDATES: tuple[Offer, ...] = (
    rescale,
    factors,
    ranked,
    wider_operator,
    larger_eps,
)
