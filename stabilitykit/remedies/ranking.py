"""Remedies side by side, on held-out inputs: finite or not, how far from float32, at what cost."""

import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from stabilitykit.diagnosis.layers import peak
from stabilitykit.formats import number_format
from stabilitykit.models.matmul import matmul, preferred_matmul
from stabilitykit.models.subject import Subject
from stabilitykit.recorder import record
from stabilitykit.records.remedies import Score
from stabilitykit.records.scaling import Scaling
from stabilitykit.remedies.original import Original
from stabilitykit.remedies.remedy import LeftOut, Remedy
from stabilitykit.remedies.samples import Inputs, answer, following
from stabilitykit.run.case import Progress
from stabilitykit.run.divergence import Distribution, divergence

_RECORDED = 3  # inputs of which the headroom is measured
_BLOCK = 64  # positions per mean of the confidence interval: neighbours are not independent


def rank(
    original: Original,
    remedies: Sequence[Remedy],
    held_out: Sequence[Inputs],
    *,
    reference: Subject | None = None,
    progress: Progress | None = None,
) -> tuple[list[Score], list[LeftOut]]:
    """The remedies' scores over `held_out`, the best first: finite ones by their mean KL, then the others; and those
    that this model cannot be run with.

    Of a model that returns no logits finite ones go by their largest error. Times are relative to the first remedy, the
    plain run. `reference`, the `original` in float32, is opened unless given; it and one model for each different set
    of weights are in memory at once. Weights that do not fit are streamed.
    """
    models: list[tuple[str, Scaling, Subject]] = []
    runs = []
    for remedy in remedies:
        known = [model for dtype, scaling, model in models if (dtype, scaling) == (remedy.dtype, remedy.scaling)]
        model = known[0] if known else original.open(remedy.dtype, remedy.scaling)
        if not known:
            models.append((remedy.dtype, remedy.scaling, model))
        runs.append(_Run(remedy, model))
    reference = reference or original.open()
    done, total = 0, (len(held_out) + 1) * len(runs)
    for inputs in held_out:
        with torch.inference_mode():
            theirs = _Reference.of(reference, inputs)
        for run in runs:
            if progress is not None:
                progress(f"held-out texts: {run.remedy.name}", done, total)
            done += 1
            if run.failure is None:
                run.add(inputs, theirs)
        del theirs  # before the next one is allocated
    scores = []
    for run in runs:
        if progress is not None:
            progress(f"headroom: {run.remedy.name}", done, total)
        done += 1
        if run.failure is None:
            scores.append(run.score(held_out, runs[0].seconds))
    return sorted(scores, key=_place), [LeftOut(run.remedy.name, run.failure) for run in runs if run.failure]


def _place(score: Score) -> tuple[bool, float]:
    far = score.kl_mean if score.kl_mean is not None else score.error
    return not score.finite, math.inf if far is None else far


class _Reference:
    """What float32 answers: [N, V] and, where they are logits, the distribution that they mean."""

    def __init__(self, values: Tensor, distribution: Distribution | None, following: Tensor | None) -> None:
        self.values = values
        self.distribution = distribution
        self.following = following
        self.largest = float(values.abs().max()) if values.numel() else 0.0

    @classmethod
    def of(cls, subject: Subject, inputs: Inputs) -> "_Reference":
        found = answer(subject.module, inputs)
        values = _comparable(_rows(found.values))
        tokens = following(subject.module, inputs)
        if tokens is None or tokens.shape != found.values.shape[:-1]:
            tokens = None
        return cls(
            values,
            Distribution.of(values) if found.logits else None,
            None if tokens is None else tokens.to(values.device),
        )


class _Run:
    """A remedy, the model it runs on, and what was measured so far."""

    def __init__(self, remedy: Remedy, model: Subject) -> None:
        self.remedy = remedy
        self.model = model
        self.kind = preferred_matmul(remedy.dtype, model.device.type)
        self.finite = True
        self.failure: str | None = None
        self.positions = 0
        self.error = 0.0
        self.seconds: list[float] = []
        self.kl: list[Tensor] = []
        self.same: list[Tensor] = []
        self.surprise: list[Tensor] = []

    def add(self, inputs: Inputs, theirs: _Reference) -> None:
        try:
            found = self.answer(inputs)
        except RuntimeError as error:  # code around a model may be more than it can take
            if self.remedy.exportable:
                raise
            self.failure = f"The model does not run with it: {str(error).splitlines()[0].removesuffix('.')}."
            return
        ours = _comparable(_rows(found))
        self.positions += len(ours)
        self.finite = self.finite and bool(ours.isfinite().all())
        if theirs.largest:
            far = (ours - theirs.values).abs_().max() / theirs.largest
            self.error = max(self.error, float(far)) if bool(far.isfinite()) else math.inf
        if theirs.distribution is None:
            return
        compared = divergence(ours, theirs.distribution)
        self.kl.append(compared.kl.cpu())
        self.same.append(compared.same.cpu())
        if theirs.following is not None:
            self.surprise.append(_surprise(ours, compared.log_totals, theirs))

    def answer(self, inputs: Inputs) -> Tensor:
        with torch.inference_mode(), matmul(self.kind), self.remedy.around(self.model.module):
            _wait(self.model.device)
            began = time.perf_counter()
            found = answer(self.model.module, inputs).values
            _wait(self.model.device)
            self.seconds.append(time.perf_counter() - began)
        return found

    def score(self, held_out: Sequence[Inputs], plain: Sequence[float]) -> Score:
        kl, same, surprise = (
            torch.cat(parts) if parts else torch.empty(0) for parts in (self.kl, self.same, self.surprise)
        )
        blocks = torch.stack([block.mean() for block in torch.split(kl, _BLOCK)]) if kl.numel() else kl
        known = kl.numel() > 0
        tokens = max(one.numel() for one in held_out[0].values())
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
            headroom=min(map(self.headroom, held_out[:_RECORDED])) if self.finite else None,
            weights=sum(weight.nbytes for weight in self.model.module.parameters()),
            extra=self.remedy.extra(tokens),
            time=statistics.median(own / base for own, base in zip(self.seconds, plain, strict=True)),
            error=self.error if math.isfinite(self.error) else None,
        )

    def headroom(self, inputs: Inputs) -> float:
        model, dtype = self.model.module, self.remedy.dtype
        with (
            torch.inference_mode(),
            self.remedy.around(model),
            record(model, formats=(), matmul=self.kind) as recording,
        ):
            answer(model, inputs)
        top = peak(r for r in recording if r.dtype == dtype)
        return number_format(dtype).headroom(0.0 if top is None else top.amax or 0.0)


def _surprise(ours: Tensor, log_totals: Tensor, theirs: _Reference) -> Tensor:
    """-log p of each next token, less the reference's; where both are finite."""
    assert theirs.following is not None
    assert theirs.distribution is not None
    rows, length = theirs.following.shape
    taken = [
        logits.view(rows, length, -1)[:, :-1].gather(-1, theirs.following[:, 1:, None])[..., 0].double()
        for logits in (ours, theirs.values)
    ]
    totals = [one.view(rows, length)[:, :-1] for one in (log_totals, theirs.distribution.log_totals)]
    found = (totals[0] - taken[0]) - (totals[1] - taken[1])
    return found[found.isfinite()].cpu()


def _rows(found: Tensor) -> Tensor:
    return found.flatten(end_dim=-2) if found.ndim > 1 else found[None]


def _comparable(values: Tensor) -> Tensor:
    """The values on a device that has float64, which Apple's GPUs lack."""
    return values.cpu() if values.device.type == "mps" else values


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
