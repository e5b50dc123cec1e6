"""Statistics of a softmax, from its logits and its probabilities, in float32 or wider."""

import torch
from torch import Tensor

from stabilitykit.records import Softmax


def measure_softmax(
    logits: Tensor, probabilities: Tensor, dim: int, head: int | None, blocked: Tensor | None
) -> Softmax:
    """Statistics of `probabilities = softmax(logits, dim)`, both of one shape.

    `head` is the dimension that counts heads, if any. `blocked`, broadcastable and boolean, is True where a
    mask hides a key; a logit of -inf counts as hidden too. A NaN in a row makes it a NaN row, which no other
    statistic looks at.
    """
    wide = torch.float64 if probabilities.dtype == torch.float64 else torch.float32
    hidden = logits == -torch.inf
    if blocked is not None:
        hidden = hidden | blocked
    p = probabilities.to(wide)
    fully_masked = hidden.all(dim)
    nan_row = p.isnan().any(dim)
    sound = ~(fully_masked | nan_row)
    entropy = torch.special.entr(p).sum(dim)
    shown = ~hidden & logits.isfinite()
    highest = logits.where(shown, -torch.inf).amax(dim)
    lowest = logits.where(shown, torch.inf).amin(dim)
    ranged = shown.any(dim)
    visible = int((~hidden).sum())
    by_head = entropy.ndim > 1 and head is not None
    heads = range(entropy.shape[head]) if by_head and head is not None else (None,)
    least, mean = zip(*(_entropy(entropy, sound, head, index) for index in heads), strict=True)
    any_sound = bool(sound.any())
    return Softmax(
        max_logit=float(highest[ranged].max()) if bool(ranged.any()) else None,
        logit_range=float((highest.to(wide) - lowest.to(wide))[ranged].max()) if bool(ranged.any()) else None,
        entropy_min=least,
        entropy_mean=mean,
        max_probability=float(p.amax(dim)[sound].max()) if any_sound else None,
        sum_error=float((p.sum(dim, dtype=torch.float64) - 1).abs()[sound].max()) if any_sound else None,
        underflow_share=float(((p == 0) & ~hidden).sum()) / visible if visible else 0.0,
        masked_rows=int(fully_masked.sum()),
        nan_rows=int(nan_row.sum()),
    )


def _entropy(entropy: Tensor, sound: Tensor, head: int | None, index: int | None) -> tuple[float, float]:
    if head is not None and index is not None:
        entropy, sound = entropy.select(head, index), sound.select(head, index)
    rows = entropy[sound]
    return (float(rows.min()), float(rows.mean())) if rows.numel() else (float("nan"), float("nan"))
