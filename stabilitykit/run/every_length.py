"""Every length of a text from a few forward passes, and the proof that they say what direct runs say.

One pass at the longest length decides every length that holds the position it breaks at. What it says of shorter
ones is void from the break on, because attention carries NaN to earlier positions: the prefix that ends just before
the culprit runs next, until one is finite throughout. That one holds all lengths that are left.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.diagnosis.layers import stored
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.models import matmul as products
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.gemma.model import soft_cap
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.subject import Subject
from stabilitykit.recorder import record
from stabilitykit.records import Level, Record, Recording
from stabilitykit.records.lengths import Check, LengthMap, Peak, Span
from stabilitykit.run.case import Progress
from stabilitykit.run.dry_run import find_stored_dtypes

AGREEMENT = 4  # ulp

# The largest peaks of a float16 run differ by up to eight ulp between kernels of different shape (measured on Gemma 3
# 270M), so a value this close to the limit might fall on either side of it.
GUARD = 8  # ulp

_MOST_DIRECT_RUNS = 16
_CHUNK = 64  # positions of logits at a time


def every_length(
    model: Gemma | Subject,
    tokens: Sequence[int],
    *,
    checks: Iterable[int] = (),
    edges: bool = True,
    level: Level = "operators",
    matmul: str = "native",
    case: Mapping[str, Any] | None = None,
    redact: bool = False,
    seen: Callable[[int, Recording], None] | None = None,
    progress: Progress | None = None,
) -> LengthMap:
    """What `model` does with the first 1, 2, ... and all of `tokens`: one row, no padding.

    `checks` are lengths to run again directly, and with `edges` those on either side of each change; out of range they
    are left out. Lengths at which a value lies within `GUARD` ulp of the limit are run directly too, up to 16 of them
    in a span, spread evenly. `seen` is called with each pass's length and recording. The kit's own model makes the
    logits of a pass's last position, transformers' those of all. `redact` keeps tokens out of the recordings. What is
    said of lengths that did not run holds for a causal model; of another one a check does not agree.
    """
    subject = GemmaSubject(model) if isinstance(model, Gemma) else model
    passes = _Passes(subject, tokens, level, matmul, dict(case or {}), redact, seen, progress)
    weight = next(one for one in subject.module.parameters() if one.is_floating_point())
    limit = number_format(str(weight.dtype))
    spans: list[Span] = []
    shared: dict[int, Recording] = {}
    top = len(tokens)
    while top:
        recording = shared[top] = passes.run(top)
        first = recording.first_break()
        held = 1 if first is None else _position(first) + 1
        spans.append(Span.of(recording, first=held, last=top, run=top))
        top = held - 1
    spans.reverse()
    if spans[0].broke is None:
        spans = [*_split(spans[0], passes.lost_logits(spans[0].last), passes), *spans[1:]]
    spans = _run_near_ones(spans, shared, limit, passes)

    sides = {length for span in spans if not span.direct for length in (span.first, span.last)} if edges else set()
    wanted = sorted({n for n in (*checks, *sides) if 1 <= n <= len(tokens)} - set(shared))
    peaks = tuple(peak for length, recording in shared.items() for peak in _peaks(recording, length))
    found = LengthMap(shared[len(tokens)].header, tuple(spans), peaks)
    checked = tuple(_check(found, length, passes.run(length), limit) for length in wanted)
    return LengthMap(found.header, found.spans, found.peaks, checked)


def _how(module: nn.Module) -> dict[str, bool]:
    if isinstance(module, Gemma):
        return {"last_only": True}
    takes = inspect.signature(module.forward).parameters.values()  # a model that only embeds may keep no cache
    caches = any(one.name == "use_cache" or one.kind is one.VAR_KEYWORD for one in takes)
    return {"use_cache": False} if caches else {}


@dataclass(slots=True)
class _Passes:
    """Recorded forward passes of prefixes, and the hidden states [1, L, E] of the last from which come the logits."""

    subject: Subject
    tokens: Sequence[int]
    level: Level
    matmul: str
    case: dict[str, Any]
    redact: bool
    seen: Callable[[int, Recording], None] | None
    progress: Progress | None
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def run(self, length: int) -> Recording:
        """The first `length` tokens, up to the first break."""

        def keep(module: Any, args: Any, output: Tensor) -> None:
            self.hidden = {length: output}

        module, layers = self.subject.module, self.subject.layers
        handles = [module.norm.register_forward_hook(keep)] if isinstance(module, Gemma) else []
        for done, layer in enumerate(layers, start=1):
            handles.append(layer.register_forward_hook(self._announce(length, done, len(layers))))
        try:
            with (
                torch.inference_mode(),
                record(
                    module,
                    level=self.level,
                    formats=(),
                    position_peaks=True,
                    stop_at_break=True,
                    matmul=self.matmul,
                    token_text=self.subject.piece,
                    case=self.case,
                    redact=self.redact,
                ) as recording,
            ):
                ids = torch.tensor([self.tokens[:length]], device=self.subject.device)
                module(ids, **_how(module))
        finally:
            for handle in handles:
                handle.remove()
        found = find_stored_dtypes(recording, self.subject, 1, length)
        if self.seen is not None:
            self.seen(length, found)
        return found

    def _announce(self, length: int, done: int, total: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self.progress is not None:
                self.progress(f"{length:,} tokens", done, total)

        return hook

    def lost_logits(self, length: int) -> list[int]:
        """The lengths up to `length` whose own logits are not finite although all before them is.

        A run of the kit's own model makes the logits of its last position only. |logit| is at most the norm of the
        hidden state times that of the head's longest row, partial sums included (Cauchy and Schwarz); only positions
        for which that does not settle it are computed.
        """
        model = self.subject.module
        if length not in self.hidden or not isinstance(model, Gemma):
            return []
        head, cap = model.lm_head, model.config.logit_softcap
        with torch.inference_mode(), products.matmul(self.matmul):
            hidden = self.hidden[length][0]
            rows = range(0, head.out_features, 4096)  # not all of them in float64 at once
            norms = [torch.linalg.vector_norm(head.weight[row : row + 4096].double(), dim=1).max() for row in rows]
            longest = float(torch.stack(norms).max())
            bound = torch.linalg.vector_norm(hidden.double(), dim=1) * longest
            doubtful = (bound * 1.01 >= torch.finfo(hidden.dtype).max).nonzero().flatten()
            lost: list[int] = []
            for start in range(0, len(doubtful), _CHUNK):
                some = doubtful[start : start + _CHUNK]
                finite = soft_cap(head(hidden[some]), cap).isfinite().all(-1)
                lost += (some[~finite] + 1).tolist()
        return lost


def _position(first: Record) -> int:
    """The position that a break needs; 0 for what breaks in every prompt, like a weight."""
    position = None if first.broke is None else first.broke.position
    return position or 0


def _split(span: Span, lengths: Iterable[int], passes: _Passes) -> list[Span]:
    """`span` with each of `lengths` run directly and a span of its own."""
    parts: list[Span] = []
    start = span.first
    for length in sorted(lengths):
        if length > start:
            parts.append(replace(span, first=start, last=length - 1))
        own = Span.of(passes.run(length), first=length, last=length, run=span.run, direct=True)
        parts.append(replace(own, near=span.near))
        start = length + 1
    if start <= span.last:
        parts.append(replace(span, first=start))
    return parts


def _run_near_ones(
    spans: list[Span], shared: Mapping[int, Recording], limit: NumberFormat, passes: _Passes
) -> list[Span]:
    found: list[Span] = []
    for span in spans:
        start = _near_from(span, shared[span.run], limit)
        if start is None or span.direct:
            found.append(span)
            continue
        if start > span.first:
            found.append(replace(span, last=start - 1))
        near = replace(span, first=start, near=True)
        count = min(near.last - near.first + 1, _MOST_DIRECT_RUNS)
        lengths = {near.first + (near.last - near.first) * i // max(count - 1, 1) for i in range(count)}
        found += _split(near, lengths, passes)
    return found


def _near_from(span: Span, recording: Recording, limit: NumberFormat) -> int | None:
    """The least length of the span at which something comes within `GUARD` ulp of the limit; None for none."""
    ulp = math.ldexp(1.0, limit.emax - limit.precision + 1)
    broke = span.broke
    if broke is not None and broke.value is not None and abs(broke.value) < limit.largest + GUARD * ulp:
        return span.first
    edge = limit.largest - GUARD * ulp
    starts = [
        position + 1
        for made in stored(recording)
        if (span.order is None or made.order < span.order) and (made.amax or 0.0) > edge
        for position, amax in enumerate(made.position_amax or ())
        if amax > edge and position < span.last
    ]
    return max(min(starts), span.first) if starts else None


def _peaks(recording: Recording, run: int) -> Iterable[Peak]:
    for made in stored(recording):
        highest = -1.0
        for position, amax in enumerate(made.position_amax or ()):
            if amax > highest:
                highest = amax
                yield Peak(
                    run=run,
                    order=made.order,
                    site=made.site,
                    label=made.label,
                    layer=made.layer,
                    position=position,
                    amax=amax,
                )


def _check(found: LengthMap, length: int, direct: Recording, form: NumberFormat) -> Check:
    first = direct.first_break()
    span = found.span(length)
    until = math.inf if first is None else first.order
    pairs: list[tuple[str, float, float]] = []
    known = set(found.sites(length))
    for made in stored(direct):
        read = found.amax(made.site, length) if made.site in known and made.position_amax else None
        if read is not None and made.amax is not None and made.order < until:
            pairs.append((made.site, made.amax, read))
    apart = [(_ulp(a, b, form), abs(a - b) / max(a, b) if max(a, b) else 0.0, site) for site, a, b in pairs]
    worst = max(apart, default=(0.0, 0.0, None), key=lambda item: item[0])
    largest = max(pairs, default=None, key=lambda pair: pair[1])
    peak_ulp = 0.0 if largest is None else _ulp(largest[1], max(read for _, _, read in pairs), form)
    direct_site = None if first is None else first.site
    return Check(
        length=length,
        site=span.site,
        direct_site=direct_site,
        ulp=worst[0],
        ulp_site=worst[2] if worst[0] else None,
        relative=max((item[1] for item in apart), default=0.0),
        compared=len(pairs),
        agrees=span.site == direct_site and peak_ulp <= AGREEMENT,
        peak_ulp=peak_ulp,
        beyond=sum(item[0] > AGREEMENT for item in apart),
    )


def _ulp(a: float, b: float, form: NumberFormat) -> float:
    """The distance of two magnitudes in units in the last place at the larger of them."""
    exponent = max(math.frexp(max(a, b))[1] - 1, form.emin)
    return math.ldexp(abs(a - b), form.precision - 1 - exponent)
