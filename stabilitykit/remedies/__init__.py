"""Changes that keep a Gemma finite in float16, how they rank, and a checkpoint that carries the best one.

To add a remedy, write a file here and enter it below; one with a parameter, as `rescaling`, is entered by `repair`.
"""

from stabilitykit.remedies.bfloat16 import BFLOAT16
from stabilitykit.remedies.clamp import CLAMP
from stabilitykit.remedies.float32_residual import FLOAT32_RESIDUAL
from stabilitykit.remedies.remedy import Remedy

REMEDIES: tuple[Remedy, ...] = (BFLOAT16, CLAMP, FLOAT32_RESIDUAL)

__all__ = ["REMEDIES", "Remedy"]
