"""Statistics of a softmax, from its logits and its probabilities, in float32 or wider."""

import math
from dataclasses import dataclass, field

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
    tally = SoftmaxTally()
    tally.add(logits, probabilities, dim, head, blocked)
    return tally.result()


@dataclass(slots=True, kw_only=True)
class SoftmaxTally:
    """`Softmax`, gathered from as many blocks of rows as one likes; each `add` is as in `measure_softmax`."""

    recomputed: bool = False
    max_logit: float = -math.inf
    logit_range: float = -math.inf
    max_probability: float = -math.inf
    sum_error: float = -math.inf
    entropies: list[list[tuple[float, float, int]]] = field(default_factory=list)  # by head: least, sum, rows
    visible: int = 0
    underflowed: int = 0
    masked_rows: int = 0
    nan_rows: int = 0

    def add(self, logits: Tensor, probabilities: Tensor, dim: int, head: int | None, blocked: Tensor | None) -> None:
        wide = torch.float64 if probabilities.dtype == torch.float64 else torch.float32
        hidden = logits == -torch.inf
        if blocked is not None:
            hidden = hidden | blocked
        p = probabilities.to(wide)
        fully_masked = hidden.all(dim)
        nan_row = p.isnan().any(dim)
        sound = ~(fully_masked | nan_row)
        shown = ~hidden & logits.isfinite()
        highest = logits.where(shown, -torch.inf).amax(dim)
        lowest = logits.where(shown, torch.inf).amin(dim)
        ranged = shown.any(dim)
        if bool(ranged.any()):
            self.max_logit = max(self.max_logit, float(highest[ranged].max()))
            self.logit_range = max(self.logit_range, float((highest.to(wide) - lowest.to(wide))[ranged].max()))
        if bool(sound.any()):
            self.max_probability = max(self.max_probability, float(p.amax(dim)[sound].max()))
            off = (p.sum(dim, dtype=torch.float64) - 1).abs()[sound]
            self.sum_error = max(self.sum_error, float(off.max()))
        self._add_entropies(torch.special.entr(p).sum(dim), sound, head)
        self.visible += int((~hidden).sum())
        self.underflowed += int(((p == 0) & ~hidden).sum())
        self.masked_rows += int(fully_masked.sum())
        self.nan_rows += int((nan_row & ~fully_masked).sum() if self.recomputed else nan_row.sum())

    def _add_entropies(self, entropy: Tensor, sound: Tensor, head: int | None) -> None:
        by_head = entropy.ndim > 1 and head is not None
        for index in range(entropy.shape[head]) if by_head and head is not None else [None]:
            at = 0 if index is None else index
            if at == len(self.entropies):
                self.entropies.append([])
            if index is None:
                rows = entropy[sound]
            else:
                assert head is not None
                rows = entropy.select(head, index)[sound.select(head, index)]
            if rows.numel():
                self.entropies[at].append((float(rows.min()), float(rows.sum(dtype=torch.float64)), rows.numel()))

    def result(self) -> Softmax:
        least = tuple(min((part[0] for part in parts), default=math.nan) for parts in self.entropies)
        mean = tuple(
            sum(part[1] for part in parts) / sum(part[2] for part in parts) if parts else math.nan
            for parts in self.entropies
        )
        return Softmax(
            max_logit=_found(self.max_logit),
            logit_range=_found(self.logit_range),
            entropy_min=least,
            entropy_mean=mean,
            max_probability=_found(self.max_probability),
            sum_error=_found(self.sum_error),
            underflow_share=self.underflowed / self.visible if self.visible else 0.0,
            masked_rows=self.masked_rows,
            nan_rows=self.nan_rows,
            recomputed=self.recomputed,
        )


def _found(largest: float) -> float | None:
    return None if largest == -math.inf else largest
