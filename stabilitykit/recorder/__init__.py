"""A running model -> records. `record(model)` is the one verb."""

from stabilitykit.recorder.recorder import DEFAULT_FORMATS, record, unrecorded

__all__ = ["DEFAULT_FORMATS", "record", "unrecorded"]
