"""Remedies side by side, on texts that chose nothing: finite or not, how far from float32, at what price."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.diagnosis.layers import peak
from stabilitykit.experiment.case import divergences
from stabilitykit.formats import number_format
from stabilitykit.gemma import Gemma, build
from stabilitykit.products import matmul, preferred_matmul
from stabilitykit.recorder import record
from stabilitykit.remedies.remedy import Remedy

Progress = Callable[[str, int, int], None]

_RECORDED = 3  # windows of which the headroom is measured
_BLOCK = 64  # positions that one mean of an interval is taken over: neighbours are not independent


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How a remedy did over `positions` tokens. Numbers are None where no position was finite.

    `kl` (nats a token: mean, half the width of its 95% interval, 99th percentile, largest) is that of float32's
    next-token distribution from the remedy's; `top1` the share of positions with the same likeliest token;
    `perplexity` the relative change of the text's. `headroom` is the least, in bits of the remedy's dtype, over what it
    stores in the first windows; None where it is not finite. `weights` and `extra` are bytes: of the weights, and of
    what a window takes beside a plain run's activations. `time` is that of a plain float16 pass, times so much.
    """

    name: str
    summary: str
    dtype: str
    finite: bool
    positions: int
    kl_mean: float | None
    kl_interval: float | None
    kl_p99: float | None
    kl_max: float | None
    top1: float | None
    perplexity: float | None
    headroom: float | None
    weights: int
    extra: int
    time: float


def rank(
    checkpoint: Checkpoint,
    remedies: Sequence[Remedy],
    windows: Sequence[Sequence[int]],
    *,
    progress: Progress | None = None,
) -> list[Score]:
    """The remedies' scores over `windows` of tokens, the best first: finite ones by their mean KL, then the others.

    The first remedy is the plain run by which times are measured. All of them are in memory at once, and the float32
    model too.
    """
    reference = build(checkpoint)
    models = [build(remedy.change(checkpoint), dtype=remedy.dtype) for remedy in remedies]
    tallies = [_Tally() for _ in remedies]
    done, total = 0, len(windows) * (len(remedies) + 1)
    for window in windows:
        ids = torch.tensor([window])
        with torch.inference_mode():
            theirs = reference(ids)[0]
        for remedy, model, tally in zip(remedies, models, tallies, strict=True):
            done += 1
            if progress is not None:
                progress(f"held-out texts: {remedy.name}", done, total)
            ours, seconds = _run(remedy, model, ids)
            tally.add(ours, theirs, ids[0], seconds)
    plain = tallies[0].seconds
    scores = []
    for remedy, model, tally in zip(remedies, models, tallies, strict=True):
        rooms = [_headroom(remedy, model, window) for window in windows[:_RECORDED]]
        scores.append(
            Score(
                name=remedy.name,
                summary=remedy.summary,
                dtype=remedy.dtype,
                finite=tally.finite,
                positions=tally.positions,
                headroom=min(rooms) if tally.finite else None,
                weights=sum(weight.nbytes for weight in model.parameters()),
                extra=remedy.extra(checkpoint.config, len(windows[0])),
                time=statistics.median(own / base for own, base in zip(tally.seconds, plain, strict=True)),
                **tally.numbers(),
            )
        )
    return sorted(scores, key=lambda score: (not score.finite, math.inf if score.kl_mean is None else score.kl_mean))


class _Tally:
    def __init__(self) -> None:
        self.finite = True
        self.positions = 0
        self.seconds: list[float] = []
        self._kl: list[Tensor] = []
        self._same: list[Tensor] = []
        self._surprise: list[Tensor] = []

    def add(self, ours: Tensor, theirs: Tensor, ids: Tensor, seconds: float) -> None:
        self.seconds.append(seconds)
        self.positions += len(ids)
        self.finite = self.finite and bool(ours.isfinite().all())
        kl, same = divergences(ours, theirs)
        self._kl.append(kl)
        self._same.append(same)
        self._surprise.append(_surprise(ours, ids) - _surprise(theirs, ids))

    def numbers(self) -> dict[str, float | None]:
        kl, same = torch.cat(self._kl), torch.cat(self._same)
        if not kl.numel():
            return dict.fromkeys(("kl_mean", "kl_interval", "kl_p99", "kl_max", "top1", "perplexity"))
        blocks = torch.stack([block.mean() for block in torch.split(kl, _BLOCK)])
        spread = float(blocks.std()) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.nan
        surprise = torch.cat(self._surprise)
        surprise = surprise[surprise.isfinite()]
        return {
            "kl_mean": float(kl.mean()),
            "kl_interval": 1.96 * spread,
            "kl_p99": float(kl.quantile(0.99)),
            "kl_max": float(kl.max()),
            "top1": float(same.double().mean()),
            "perplexity": math.expm1(float(surprise.mean())) if surprise.numel() else None,
        }


def _surprise(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p of each next token, in nats, in float64."""
    parts = []
    for start in range(0, len(ids) - 1, _BLOCK):
        some = logits[start : min(start + _BLOCK, len(ids) - 1)].double()
        parts.append(some.logsumexp(-1) - some.gather(-1, ids[start + 1 : start + 1 + len(some), None])[:, 0])
    return torch.cat(parts)


def _run(remedy: Remedy, model: Gemma, ids: Tensor) -> tuple[Tensor, float]:
    with torch.inference_mode(), matmul(preferred_matmul(remedy.dtype, "cpu")), remedy.around(model):
        began = time.perf_counter()
        logits = model(ids)[0]
        return logits, time.perf_counter() - began


def _headroom(remedy: Remedy, model: Gemma, window: Sequence[int]) -> float:
    kind = preferred_matmul(remedy.dtype, "cpu")
    with torch.inference_mode(), remedy.around(model), record(model, formats=(), matmul=kind) as recording:
        model(torch.tensor([window]), last_only=True)
    top = peak(r for r in recording if r.dtype == remedy.dtype)
    return number_format(remedy.dtype).headroom(0.0 if top is None else top.amax or 0.0)
