"""Remedies that keep a Gemma finite in float16, their ranking, and a checkpoint that carries the best one.

To add a remedy, write a file here and enter it below; `repair` enters those with a parameter, such as `rescaling`.
"""

from stabilitykit.remedies.bfloat16 import BFLOAT16
from stabilitykit.remedies.clamp import CLAMP
from stabilitykit.remedies.float32_residual import FLOAT32_RESIDUAL
from stabilitykit.remedies.remedy import Remedy

REMEDIES: tuple[Remedy, ...] = (BFLOAT16, CLAMP, FLOAT32_RESIDUAL)

__all__ = ["REMEDIES", "Remedy"]
