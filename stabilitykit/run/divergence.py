"""How far one run's next-token distributions are from another's, computed in float64."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.records import LogitsError

_CHUNK = 32  # positions in float64 at a time


@dataclass(frozen=True, slots=True)
class Distribution:
    """Logits [L, V] of a reference run, with what every comparison asks of them, in float64: twice float32's memory.

    `weights` [L, V] are exp(logit − largest), `totals` [L] their sums, `means` [L] the mean of logit − largest.
    `likeliest` [L] are the tokens with the largest logits, of several the first; `log_totals` [L] log Σ exp(logit).
    """

    logits: Tensor
    weights: Tensor
    totals: Tensor
    means: Tensor
    likeliest: Tensor
    log_totals: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "Distribution":
        weights = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
        totals, means, largest = (torch.empty_like(weights[:, 0]) for _ in range(3))
        for part, below, top in _chunks(logits, _CHUNK):
            torch.exp(below, out=weights[part])
            totals[part] = weights[part].sum(-1)
            means[part] = torch.linalg.vecdot(weights[part], below) / totals[part]
            largest[part] = top
        return cls(logits, weights, totals, means, logits.argmax(-1), totals.log() + largest)


@dataclass(frozen=True, slots=True)
class Divergence:
    """`kl` is KL(reference, ours) in nats and `same` whether the likeliest token is, at each of the positions [L'] at
    which all logits of both are finite. `log_totals` are log Σ exp(logit) of ours at all positions [L].
    """

    kl: Tensor
    same: Tensor
    log_totals: Tensor


def divergence(logits: Tensor, reference: Distribution, *, chunk: int = _CHUNK) -> Divergence:
    """`Divergence` of logits [L, V], `chunk` positions at a time."""
    kl, log_totals = (torch.empty_like(reference.totals) for _ in range(2))
    for part, below, top in _chunks(logits, chunk):
        total = reference.totals[part]
        mean = torch.linalg.vecdot(reference.weights[part], below) / total
        own = below.exp_().sum(-1)
        # No divergence is negative; of rows that are all but equal, rounding leaves a little of either sign.
        kl[part] = ((reference.means[part] - mean) - (total.log() - own.log())).clamp(min=0)
        log_totals[part] = own.log() + top
    sound = kl.isfinite()  # a logit that is not finite leaves NaN or an infinity in one of the sums
    return Divergence(kl[sound], (logits.argmax(-1) == reference.likeliest)[sound], log_totals)


def logits_error(logits: Tensor, reference: Tensor, *, chunk: int = _CHUNK) -> LogitsError:
    """`LogitsError` of logits [L, V] against those of the reference run, `chunk` positions at a time."""
    parts = [
        divergence(logits[start : start + chunk], Distribution.of(reference[start : start + chunk]), chunk=chunk)
        for start in range(0, len(logits), chunk)
    ]
    kl, same = torch.cat([part.kl for part in parts]), torch.cat([part.same for part in parts])
    compared = kl.numel()
    return LogitsError(
        kl_mean=float(kl.mean()) if compared else None,
        kl_max=float(kl.max()) if compared else None,
        top1=int(same.sum()) / compared if compared else None,
        compared=compared,
        positions=len(logits),
    )


def _chunks(logits: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few positions at a time: which, logit − largest in float64, in memory that the next ones take, and largest."""
    memory = torch.empty(min(chunk, len(logits)), *logits.shape[1:], dtype=torch.float64, device=logits.device)
    for start in range(0, len(logits), chunk):
        some = logits[start : start + chunk]
        top = some.amax(-1).double()
        yield slice(start, start + len(some)), memory[: len(some)].copy_(some).sub_(top[:, None]), top
