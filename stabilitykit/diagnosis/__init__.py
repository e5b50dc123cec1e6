"""Records -> findings, without torch: the first break, its chain, its cause, and the table by layer."""

from stabilitykit.diagnosis.cause import Cause, cause
from stabilitykit.diagnosis.chain import Link, chain
from stabilitykit.diagnosis.layers import LayerRow, StepRow, by_layer, by_step
from stabilitykit.diagnosis.verdict import document, is_finite, verdict, weights_sentence

__all__ = [
    "Cause",
    "LayerRow",
    "Link",
    "StepRow",
    "by_layer",
    "by_step",
    "cause",
    "chain",
    "document",
    "is_finite",
    "verdict",
    "weights_sentence",
]
