"""Remedies that keep a model finite in float16, their ranking, and a checkpoint that carries the best one.

To add a remedy, write a file here with a function that looks at what float32 runs showed and makes the remedy, or says
why it does not apply, and enter it below.
"""

from collections.abc import Callable

from stabilitykit.remedies.bfloat16 import bfloat16
from stabilitykit.remedies.clamp import clamp
from stabilitykit.remedies.expert_outputs import expert_outputs
from stabilitykit.remedies.float32_islands import float32_islands
from stabilitykit.remedies.float32_norms import float32_norms
from stabilitykit.remedies.float32_residual import float32_residual
from stabilitykit.remedies.query_scale import query_scale
from stabilitykit.remedies.remedy import LeftOut, Remedy
from stabilitykit.remedies.seen import Seen

REMEDIES: tuple[Callable[[Seen], Remedy | LeftOut], ...] = (
    bfloat16,
    clamp,
    float32_residual,
    float32_islands,
    query_scale,
    expert_outputs,
    float32_norms,
)

__all__ = ["REMEDIES", "LeftOut", "Remedy", "Seen"]
