"""Statistics of a softmax, from its logits and its probabilities, in float32 or wider."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.recorder.kernels import device
from stabilitykit.recorder.kernels.layout import FLOATS
from stabilitykit.recorder.kernels.softmax_layout import FIELDS, HEAD_FIELDS, Field, empty_row, merged
from stabilitykit.records import Softmax


@dataclass(slots=True, kw_only=True)
class SoftmaxTally:
    """`Softmax`, gathered from as many blocks of rows as one likes. Nothing waits for the tensors' device but `result`.

    `recomputed` as there.
    """

    recomputed: bool = False
    rows: list[NDArray[np.float64] | Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, probabilities: Tensor, dim: int, head: int | None, blocked: Tensor | None) -> None:
        """`probabilities = softmax(logits, dim)`, both of one shape.

        `head` is the dimension that counts heads, if any. `blocked`, broadcastable and boolean, is True where a mask
        hides a key; a logit of -inf counts as hidden too. A NaN in a row makes it a NaN row, which no other statistic
        looks at.
        """
        if logits.ndim == 1:
            head = None
        if blocked is not None:
            blocked = blocked.expand(logits.shape)
        if head is not None and head > dim % logits.ndim:
            head -= 1
        logits, probabilities = logits.movedim(dim, -1), probabilities.movedim(dim, -1)
        blocked = None if blocked is None else blocked.movedim(dim, -1)
        self.rows.append(_tally(logits, probabilities, head, blocked))

    def result(self) -> Softmax:
        rows = [row.numpy(force=True) if isinstance(row, Tensor) else row for row in self.rows]
        row = merged(np.stack(rows)) if rows else empty_row(0)
        largest = [None if value == -math.inf else value for value in row[:FIELDS].tolist()]
        visible = row[Field.VISIBLE]
        heads = row[FIELDS:].reshape(-1, HEAD_FIELDS).tolist()
        nan_rows = row[Field.NAN_ROWS] - (row[Field.BOTH_ROWS] if self.recomputed else 0)
        return Softmax(
            max_logit=largest[Field.MAX_LOGIT],
            logit_range=largest[Field.RANGE],
            entropy_min=tuple(least if rows else math.nan for least, _, rows in heads),
            entropy_mean=tuple(total / rows if rows else math.nan for _, total, rows in heads),
            max_probability=largest[Field.MAX_PROBABILITY],
            sum_error=largest[Field.SUM_ERROR],
            underflow_share=float(row[Field.UNDERFLOWED] / visible) if visible else 0.0,
            masked_rows=int(row[Field.MASKED_ROWS]),
            nan_rows=int(nan_rows),
            recomputed=self.recomputed,
        )


def _tally(
    logits: Tensor, probabilities: Tensor, head: int | None, hidden: Tensor | None
) -> NDArray[np.float64] | Tensor:
    dtypes = {logits.dtype, probabilities.dtype}
    if logits.device == probabilities.device and dtypes <= FLOATS and (torch.float64 not in dtypes or len(dtypes) == 1):
        if logits.device.type == "cpu":
            from stabilitykit.recorder.kernels import cpu_softmax  # numba, only when something is measured

            return cpu_softmax.tally(logits, probabilities, head, hidden)
        if device.runs_triton(logits.device):
            from stabilitykit.recorder.kernels import cuda_softmax  # Triton, which other machines may lack

            return cuda_softmax.tally(logits, probabilities, head, hidden)
    from stabilitykit.recorder.kernels import plain_softmax

    return plain_softmax.tally(logits, probabilities, head, hidden)
