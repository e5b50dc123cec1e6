"""The statistics of a softmax in torch's own operators: on any device that has float64, without a wait for it."""

import math

import torch
from torch import Tensor

from stabilitykit.recorder.kernels.softmax_layout import FIELDS, HEAD_FIELDS, Field


def tally(logits: Tensor, probabilities: Tensor, head: int | None, hidden: Tensor | None) -> Tensor:
    """A row of `softmax_layout`, float64 on the tensors' device.

    They have one shape; the softmax runs over their last dimension.
    """
    wide = torch.float64 if probabilities.dtype == torch.float64 else torch.float32
    gone = logits == -math.inf if hidden is None else (logits == -math.inf) | hidden
    p = probabilities.to(wide)
    masked, nan = gone.all(-1), p.isnan().any(-1)
    sound = ~(masked | nan)
    shown = ~gone & logits.isfinite()
    highest = logits.where(shown, -math.inf).amax(-1).to(wide)
    lowest = logits.where(shown, math.inf).amin(-1).to(wide)
    entropy = torch.special.entr(p).sum(-1, dtype=torch.float64)
    heads = 1 if head is None else logits.shape[head]

    row = torch.zeros(FIELDS + HEAD_FIELDS * heads, dtype=torch.float64, device=logits.device)  # a copy would wait
    row[Field.MAX_LOGIT] = highest.max()
    row[Field.RANGE] = (highest - lowest).where(shown.any(-1), -math.inf).max()
    row[Field.MAX_PROBABILITY] = p.amax(-1).where(sound, -math.inf).max()
    row[Field.SUM_ERROR] = (p.sum(-1, dtype=torch.float64) - 1).abs().where(sound, -math.inf).max()
    row[Field.VISIBLE] = (~gone).sum()
    row[Field.UNDERFLOWED] = ((p == 0) & ~gone).sum()
    row[Field.MASKED_ROWS], row[Field.NAN_ROWS], row[Field.BOTH_ROWS] = masked.sum(), nan.sum(), (masked & nan).sum()
    by_head = [part if head is None else part.movedim(head, 0) for part in (entropy, sound)]
    entropy, sound = (part.reshape(heads, -1) for part in by_head)
    row[FIELDS::HEAD_FIELDS] = entropy.where(sound, math.inf).amin(-1)
    row[FIELDS + 1 :: HEAD_FIELDS] = entropy.where(sound, 0.0).sum(-1)
    row[FIELDS + 2 :: HEAD_FIELDS] = sound.sum(-1).double()
    return row
