"""How far the next-token distributions of many runs are from those of one reference: quickly, where they are near.

With p the reference's probabilities and d = ours − theirs, of logits, less what d is at the likeliest token,

    KL = log Σ p exp(d) − Σ p d = Q − (S − log(1 + S)),  Q = Σ p (exp(d) − 1 − d),  S = Q + Σ p d

in which nothing cancels where d is small, so that float32 will do for each term and float64 for the sums. Positions
where it is not small are computed by `stabilitykit.run.divergence`, in float64 throughout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.run.divergence import Distribution, divergence

_CHUNK = 4  # positions at a time, which stay in a processor's caches
_FAR = 16.0  # a difference of logits beyond which float32's exponentials lose what counts


@dataclass(frozen=True, slots=True)
class Probabilities:
    """Of a reference's `logits` [L, V], in float32, the `probabilities` [L, V], the `likeliest` tokens [L], the first
    of several, and log Σ exp(logit), `log_totals` [L], in float64.
    """

    logits: Tensor
    probabilities: Tensor
    likeliest: Tensor
    log_totals: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "Probabilities":
        made = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        log_totals = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
        for start in range(0, len(logits), _CHUNK):
            part = slice(start, start + _CHUNK)
            top = logits[part].amax(-1, keepdim=True)
            below = torch.sub(logits[part], top, out=made[part]).exp_()
            total = below.sum(-1, dtype=torch.float64)
            below.div_(total[:, None])
            log_totals[part] = total.log() + top[:, 0]
        return cls(logits, made, logits.argmax(-1), log_totals)


@dataclass(frozen=True, slots=True)
class Nearness:
    """`kl` is KL(reference, ours) in nats and `same` whether the likeliest token is, at each of the positions [L'] at
    which all logits of ours are finite. `log_totals` are log Σ exp(logit) of ours at all positions [L]. `error` is the
    largest difference of a logit, NaN where one is not finite.
    """

    kl: Tensor
    same: Tensor
    log_totals: Tensor
    error: float


def nearness(logits: Tensor, reference: Probabilities) -> Nearness:
    """`Nearness` of logits [L, V], of any dtype, to a reference whose logits are finite."""
    kl, log_totals = (torch.empty_like(reference.log_totals) for _ in range(2))
    largest = torch.empty_like(kl)
    places = torch.arange(len(logits), device=logits.device)
    for start in range(0, len(logits), _CHUNK):
        part = slice(start, start + _CHUNK)
        away = logits[part].float() - reference.logits[part]
        low, high = away.aminmax(dim=-1)
        largest[part] = torch.maximum(low.abs(), high.abs())
        shift = away.gather(-1, reference.likeliest[part, None])
        away -= shift
        p = reference.probabilities[part]
        mean = (p * away).sum(-1, dtype=torch.float64)
        curved = torch.expm1(away).sub_(away).mul_(p).sum(-1, dtype=torch.float64)
        total = curved + mean
        # No divergence is negative; of rows that are all but equal, rounding leaves a little of either sign.
        kl[part] = (curved - (total - total.log1p())).clamp(min=0)
        log_totals[part] = reference.log_totals[part] + total.log1p() + shift[:, 0]
    far = places[largest.isfinite() & (largest > _FAR)]
    if len(far):
        exact = divergence(logits[far].float(), Distribution.of(reference.logits[far]))
        kl[far], log_totals[far] = exact.kl, exact.log_totals
    sound = largest.isfinite()
    return Nearness(
        kl=kl[sound],
        same=(logits.argmax(-1) == reference.likeliest)[sound],
        log_totals=log_totals,
        error=float(largest.max()) if len(largest) else 0.0,
    )
