"""Remedies side by side, on held-out texts: finite or not, how far from float32, at what cost."""

import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.diagnosis.layers import peak
from stabilitykit.formats import number_format
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.models.matmul import matmul, preferred_matmul
from stabilitykit.recorder import record
from stabilitykit.records.remedies import Score
from stabilitykit.remedies.remedy import Remedy
from stabilitykit.run.case import Progress
from stabilitykit.run.divergence import Distribution, divergence

_RECORDED = 3  # windows of which the headroom is measured
_BLOCK = 64  # positions per mean of the confidence interval: neighbours are not independent


def rank(
    checkpoint: Checkpoint,
    remedies: Sequence[Remedy],
    windows: Sequence[Sequence[int]],
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Score]:
    """The remedies' scores over `windows` of tokens, the best first: finite ones by their mean KL, then the others.

    Times are relative to the first remedy, the plain run. The float32 model and one model for each different set of
    weights are in memory at once; weights that do not fit are streamed.
    """
    reference = build(checkpoint, device=device)
    models: dict[object, Gemma] = {}
    runs = []
    for remedy in remedies:
        weights = remedy.change, remedy.dtype
        if weights not in models:
            models[weights] = build(remedy.change(checkpoint), dtype=remedy.dtype, device=device)
        runs.append(_Run(remedy, models[weights]))
    done, total = 0, (len(windows) + 1) * len(runs)
    for window in windows:
        ids = torch.tensor([window], device=device)
        with torch.inference_mode():
            theirs = Distribution.of(_comparable(reference(ids)[0]))
        for run in runs:
            if progress is not None:
                progress(f"held-out texts: {run.remedy.name}", done, total)
            done += 1
            run.add(ids, theirs)
        del theirs  # before the next one is allocated
    scores = []
    for run in runs:
        if progress is not None:
            progress(f"headroom: {run.remedy.name}", done, total)
        done += 1
        scores.append(run.score(checkpoint, windows, runs[0].seconds))
    return sorted(scores, key=lambda score: (not score.finite, math.inf if score.kl_mean is None else score.kl_mean))


class _Run:
    """A remedy, the model it runs on, and what was measured so far."""

    def __init__(self, remedy: Remedy, model: Gemma) -> None:
        self.remedy = remedy
        self.model = model
        self.kind = preferred_matmul(remedy.dtype, model.device.type)
        self.finite = True
        self.positions = 0
        self.seconds: list[float] = []
        self.kl: list[Tensor] = []
        self.same: list[Tensor] = []
        self.surprise: list[Tensor] = []

    def add(self, ids: Tensor, theirs: Distribution) -> None:
        with torch.inference_mode(), matmul(self.kind), self.remedy.around(self.model):
            _wait(self.model.device)
            began = time.perf_counter()
            logits = self.model(ids)[0]
            _wait(self.model.device)
            self.seconds.append(time.perf_counter() - began)
        ours = _comparable(logits)
        self.positions += len(ours)
        self.finite = self.finite and bool(ours.isfinite().all())
        found = divergence(ours, theirs)
        self.kl.append(found.kl.cpu())
        self.same.append(found.same.cpu())
        following = ids[0, 1:, None].to(ours.device)
        own, other = (logits[:-1].gather(-1, following)[:, 0].double() for logits in (ours, theirs.logits))
        # -log p of each next token, less the reference's
        surprise = (found.log_totals[:-1] - own) - (theirs.log_totals[:-1] - other)
        self.surprise.append(surprise[surprise.isfinite()].cpu())

    def score(self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], plain: Sequence[float]) -> Score:
        kl, same, surprise = map(torch.cat, (self.kl, self.same, self.surprise))
        blocks = torch.stack([block.mean() for block in torch.split(kl, _BLOCK)]) if kl.numel() else kl
        known = kl.numel() > 0
        return Score(
            name=self.remedy.name,
            summary=self.remedy.summary,
            dtype=self.remedy.dtype,
            exportable=self.remedy.exportable,
            finite=self.finite,
            positions=self.positions,
            kl_mean=float(kl.mean()) if known else None,
            kl_interval=1.96 * float(blocks.std()) / math.sqrt(len(blocks)) if len(blocks) > 1 else None,
            kl_p99=float(kl.quantile(0.99)) if known else None,
            kl_max=float(kl.max()) if known else None,
            top1=float(same.double().mean()) if known else None,
            perplexity=math.expm1(float(surprise.mean())) if surprise.numel() else None,
            headroom=min(map(self.headroom, windows[:_RECORDED])) if self.finite else None,
            weights=sum(weight.nbytes for weight in self.model.parameters()),
            extra=self.remedy.extra(checkpoint.config, len(windows[0])),
            time=statistics.median(own / base for own, base in zip(self.seconds, plain, strict=True)),
        )

    def headroom(self, window: Sequence[int]) -> float:
        model, dtype = self.model, self.remedy.dtype
        ids = torch.tensor([window], device=model.device)
        with (
            torch.inference_mode(),
            self.remedy.around(model),
            record(model, formats=(), matmul=self.kind) as recording,
        ):
            model(ids, last_only=True)
        top = peak(r for r in recording if r.dtype == dtype)
        return number_format(dtype).headroom(0.0 if top is None else top.amax or 0.0)


def _comparable(logits: Tensor) -> Tensor:
    """The logits on a device that has float64, which Apple's GPUs lack."""
    return logits.cpu() if logits.device.type == "mps" else logits


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
