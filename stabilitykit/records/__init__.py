"""What is written, and read again without torch: records, and the typed results of every question."""

from stabilitykit.records.record import (
    Break as Break,
)
from stabilitykit.records.record import (
    BreakKind as BreakKind,
)
from stabilitykit.records.record import (
    Deviation as Deviation,
)
from stabilitykit.records.record import (
    FormatCounts as FormatCounts,
)
from stabilitykit.records.record import (
    Level as Level,
)
from stabilitykit.records.record import (
    LogitsError as LogitsError,
)
from stabilitykit.records.record import (
    Record as Record,
)
from stabilitykit.records.record import (
    Softmax as Softmax,
)
from stabilitykit.records.record import (
    StoredWeights as StoredWeights,
)
from stabilitykit.records.record import (
    WeightCounts as WeightCounts,
)
from stabilitykit.records.record import (
    flat_index as flat_index,
)
from stabilitykit.records.record import (
    index_at as index_at,
)
from stabilitykit.records.recording import Header as Header
from stabilitykit.records.recording import Recording as Recording
