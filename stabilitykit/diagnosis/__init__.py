"""Records -> findings, without torch: the first break, its chain, its cause, and the table by layer."""

from stabilitykit.diagnosis.cause import Cause, cause
from stabilitykit.diagnosis.chain import Link, chain
from stabilitykit.diagnosis.layers import LayerRow, by_layer
from stabilitykit.diagnosis.verdict import document, is_finite, verdict

__all__ = ["Cause", "LayerRow", "Link", "by_layer", "cause", "chain", "document", "is_finite", "verdict"]
