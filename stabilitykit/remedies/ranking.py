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
from stabilitykit.remedies.nearness import Probabilities, nearness
from stabilitykit.remedies.original import Original
from stabilitykit.remedies.remedy import LeftOut, Remedy
from stabilitykit.remedies.samples import Inputs, answer, following
from stabilitykit.run.case import Progress

_RECORDED = 3  # inputs of which the headroom is measured, at most
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
        runs.append(_Run(remedy, model, min(_RECORDED, (len(held_out) + 1) // 2)))
    reference = reference or original.open()
    done, total = 0, len(held_out) * len(runs)
    for inputs in held_out:
        with torch.inference_mode():
            theirs = _Reference(reference, inputs)
        for run in runs:
            if progress is not None:
                progress(f"held-out texts: {run.remedy.name}", done, total)
            done += 1
            if run.failure is None:
                run.add(inputs, theirs)
        del theirs  # before the next one is allocated
    scores = [run.score(held_out, runs[0].seconds) for run in runs if run.failure is None]
    return sorted(scores, key=_place), [LeftOut(run.remedy.name, run.failure) for run in runs if run.failure]


def _place(score: Score) -> tuple[bool, float]:
    far = score.kl_mean if score.kl_mean is not None else score.error
    return not score.finite, math.inf if far is None else far


class _Reference:
    """What float32 answers: `values` [N, V] and, where they are logits, the probabilities that they mean."""

    def __init__(self, subject: Subject, inputs: Inputs) -> None:
        found = answer(subject.module, inputs)
        self.values = _comparable(_rows(found.values))
        self.probabilities = Probabilities.of(self.values) if found.logits else None
        self.largest = _largest(self.values)
        tokens = following(subject.module, inputs)
        is_each = tokens is not None and tokens.shape == found.values.shape[:-1]
        self.following = tokens.to(self.values.device) if tokens is not None and is_each else None


class _Run:
    """A remedy, the model it runs on, and what was measured so far. The first `records` inputs are recorded, for the
    headroom that they leave; the others tell how long a pass takes.
    """

    def __init__(self, remedy: Remedy, model: Subject, records: int) -> None:
        self.records = records
        self.remedy = remedy
        self.model = model
        self.kind = preferred_matmul(remedy.dtype, model.device.type)
        self.finite = True
        self.failure: str | None = None
        self.positions = 0
        self.error = 0.0
        self.seconds: list[float] = []
        self.headrooms: list[float] = []
        self.kl: list[Tensor] = []
        self.same: list[Tensor] = []
        self.surprise: list[Tensor] = []

    def add(self, inputs: Inputs, theirs: _Reference) -> None:
        try:
            found = self.recorded(inputs) if len(self.headrooms) < self.records else self.timed(inputs)
        except RuntimeError as error:  # code around a model may be more than it can take
            if self.remedy.exportable:
                raise
            self.failure = f"The model does not run with it: {str(error).splitlines()[0].removesuffix('.')}."
            return
        ours = _comparable(_rows(found))
        self.positions += len(ours)
        if theirs.probabilities is None:
            far = float((ours - theirs.values).abs().max())
        else:
            compared = nearness(ours, theirs.probabilities)
            far = compared.error
            self.kl.append(compared.kl.cpu())
            self.same.append(compared.same.cpu())
            if theirs.following is not None:
                self.surprise.append(_surprise(ours, compared.log_totals, theirs))
        self.finite = self.finite and math.isfinite(far)
        if theirs.largest:
            self.error = max(self.error, far / theirs.largest) if math.isfinite(far) else math.inf

    def timed(self, inputs: Inputs) -> Tensor:
        with torch.inference_mode(), matmul(self.kind), self.remedy.around(self.model.module):
            _wait(self.model.device)
            began = time.perf_counter()
            found = answer(self.model.module, inputs).values
            _wait(self.model.device)
            self.seconds.append(time.perf_counter() - began)
        return found

    def recorded(self, inputs: Inputs) -> Tensor:
        model, dtype = self.model.module, self.remedy.dtype
        with (
            torch.inference_mode(),
            self.remedy.around(model),
            record(model, formats=(), matmul=self.kind, fused_softmax=False) as recording,
        ):
            found = answer(model, inputs).values
        top = peak(r for r in recording if r.dtype == dtype)
        self.headrooms.append(number_format(dtype).headroom(0.0 if top is None else top.amax or 0.0))
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
            headroom=min(self.headrooms) if self.finite else None,
            weights=sum(weight.nbytes for weight in self.model.module.parameters()),
            extra=self.remedy.extra(tokens),
            time=statistics.median(own / base for own, base in zip(self.seconds, plain, strict=True))
            if plain
            else None,
            error=self.error if math.isfinite(self.error) else None,
        )


def _surprise(ours: Tensor, log_totals: Tensor, theirs: _Reference) -> Tensor:
    """-log p of each next token, less the reference's; where both are finite."""
    assert theirs.following is not None
    assert theirs.probabilities is not None
    rows, length = theirs.following.shape
    taken = [
        logits.view(rows, length, -1)[:, :-1].gather(-1, theirs.following[:, 1:, None])[..., 0].double()
        for logits in (ours, theirs.values)
    ]
    totals = [one.view(rows, length)[:, :-1] for one in (log_totals, theirs.probabilities.log_totals)]
    found = (totals[0] - taken[0]) - (totals[1] - taken[1])
    return found[found.isfinite()].cpu()


def _largest(values: Tensor) -> float:
    """The largest magnitude; 0 of no values."""
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    return max(abs(float(low)), abs(float(high)))


def _rows(found: Tensor) -> Tensor:
    return found.flatten(end_dim=-2) if found.ndim > 1 else found[None]


def _comparable(values: Tensor) -> Tensor:
    """The values on a device that has float64, which Apple's GPUs lack."""
    return values.cpu() if values.device.type == "mps" else values


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
