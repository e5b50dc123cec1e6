"""The softmax inside a fused attention kernel, which keeps no probabilities: computed again, for its statistics alone.

The kernel's output is the user's and stays as it is. Scores are made in float32 by blocks of queries, so that memory
does not grow with the square of the length.
"""

import math
from typing import Any

import torch
from torch import Tensor

from stabilitykit.recorder.masks import blocks
from stabilitykit.recorder.softmax import SoftmaxTally

FUSED_ATTENTION = "scaled_dot_product_attention"  # the canonical name of all such kernels

_ELEMENTS = 1 << 24  # of the scores that are in memory at once


def recompute_softmax(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SoftmaxTally | None:
    """Statistics of the probabilities that this call of a fused kernel weighed its values with.

    Queries [B, H, T, D] and keys [B, G, K, D] as they were given, H a multiple of G. Masks are boolean (True: look) or
    added; a causal kernel without one lets query t see keys up to t, as torch does. None for other shapes, such as
    nested tensors.
    """
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    q, k = given["query"], given["key"]
    mask = given.get("attn_mask", given.get("attn_bias"))
    if q.ndim != 4 or k.ndim != 4 or q.is_nested or q.shape[1] % k.shape[1] or 0 in q.shape or 0 in k.shape:
        return None
    scale = given.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(2, 3)
    tally = SoftmaxTally(recomputed=True)
    step = max(1, _ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        scores = torch.matmul(q[:, :, start : start + step].to(wide), keys) * scale
        hidden = _hidden(mask, scores, start, causal=bool(given.get("is_causal", False)))
        if mask is not None and mask.is_floating_point():
            scores = scores + _rows(mask, scores, start)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        # a row that hides every key gives NaN here and is counted as what it is: fully masked
        tally.add(scores, torch.softmax(scores, -1), -1, 1, hidden)
    return tally


def _hidden(mask: Tensor | None, scores: Tensor, start: int, *, causal: bool) -> Tensor | None:
    if mask is not None:
        rows = _rows(mask, scores, start)
        return ~rows if mask.dtype == torch.bool else blocks(rows)
    if causal:
        query = torch.arange(start, start + scores.shape[-2], device=scores.device)[:, None]
        return (torch.arange(scores.shape[-1], device=scores.device) > query).expand(scores.shape)
    return None


def _rows(mask: Tensor, scores: Tensor, start: int) -> Tensor:
    """The mask's rows for a block of scores, in their shape."""
    if mask.shape[-2] != 1:
        mask = mask[..., start : start + scores.shape[-2], :]
    return mask.expand(scores.shape)
