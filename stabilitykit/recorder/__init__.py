"""A running model -> records. `record(model)` is the one verb; `describe` takes tensors of another engine."""

from stabilitykit.recorder.custom import Statistic
from stabilitykit.recorder.describe import Where, describe
from stabilitykit.recorder.observe import DEFAULT_FORMATS
from stabilitykit.recorder.record import record, unrecorded

__all__ = ["DEFAULT_FORMATS", "Statistic", "Where", "describe", "record", "unrecorded"]
