"""What is written, and read again without torch: records, and the typed results of every question."""

from stabilitykit.choices import Level
from stabilitykit.records.record import (
    BACKWARD,
    WEIGHT_GRADIENT,
    Break,
    BreakKind,
    Deviation,
    FormatCounts,
    LogitsError,
    OriginKind,
    Record,
    Softmax,
    StoredWeights,
    WeightCount,
    WeightCounts,
    WeightRole,
    flat_index,
    index_at,
)
from stabilitykit.records.recording import Header, Recording

__all__ = [
    "BACKWARD",
    "WEIGHT_GRADIENT",
    "Break",
    "BreakKind",
    "Deviation",
    "FormatCounts",
    "Header",
    "Level",
    "LogitsError",
    "OriginKind",
    "Record",
    "Recording",
    "Softmax",
    "StoredWeights",
    "WeightCount",
    "WeightCounts",
    "WeightRole",
    "flat_index",
    "index_at",
]
