"""One case: a model and a prompt, continued by a token or more, recorded and compared with a reference."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.matmul import preferred_matmul
from stabilitykit.models.subject import Continuation, Sampling, Subject
from stabilitykit.recorder import record, unrecorded
from stabilitykit.recorder.copies import Copies
from stabilitykit.records import Level, Recording, StoredWeights
from stabilitykit.run.divergence import logits_error
from stabilitykit.run.dry_run import find_stored_dtypes

_ROOM = 1 << 30  # bytes for copies of tensors, until they have been compared

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and out of how much."""


def stage(what: str, progress: Progress | None) -> Callable[[int, int], None]:
    """`progress` for one thing that is done, called with how much of it is done and out of how much."""

    def announce(done: int, total: int) -> None:
        if progress is not None:
            progress(what, done, total)

    return announce


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A recording and the exception that sampling raised, if any."""

    recording: Recording
    error: RuntimeError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a float32 run made of the same tokens: tensors by site, and logits [L, V] of every position."""

    tensors: dict[str, Tensor]
    logits: Tensor


def run_reference(model: Gemma, tokens: Sequence[int], *, left_padding: int = 0) -> Reference:
    """One pass whose tensors are kept for others to be compared with; as much memory as the modules' outputs take."""
    ids, padding = _padded(GemmaSubject(model), tokens, left_padding)
    tensors: dict[str, Tensor] = {}
    with torch.inference_mode(), record(model, formats=(), keep=tensors):
        logits = model(ids, padding=padding)
    return Reference(tensors=tensors, logits=logits[0])


class Options(TypedDict, total=False):
    """What a run hands on to `stabilitykit.record`, which says what each is."""

    level: Level
    formats: Sequence[str]
    position_peaks: bool
    fused_softmax: bool
    watch: Sequence[tuple[str, int]]
    redact: bool
    keep_operands: bool
    copies: Copies | None
    compared: Sequence[Copies]


def run_case(
    model: Gemma | Subject,
    tokens: Sequence[int],
    *,
    new_tokens: int = 1,
    left_padding: int = 0,
    mask: Tensor | None = None,
    sampling: Sampling | None = None,
    every_logit: bool = False,
    matmul: str = "native",
    reference: Reference | None = None,
    weights: StoredWeights | None = None,
    facts: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Run:
    """Continues `tokens`, after `left_padding` pad tokens, by `new_tokens`; recorded throughout.

    Each new token is a forward pass and a draw; the first pass whose last logits are not finite is the last. `mask`
    replaces the model's own, as in its `forward`. `every_logit` makes and records the logits of all positions; with a
    `reference` they are compared with its. `weights` goes into the header. `facts` join what the header's `case` says,
    and so does `next_text`, the token that greedy decoding takes at the last step, unless redacted. Where that token's
    own logit is not finite it was not chosen by the model: `greedy_text` is the token then, `greedy_logit` what its
    logit is, "nan", "inf" or, if all are, "-inf". Records say in which dtype a run in float16 stores them. `matmul` is
    how 16-bit matrix products are computed.

    Raises MisuseError for no tokens or more than the model's context; an error of the sampler is returned, any other
    raised.
    """
    subject = GemmaSubject(model) if isinstance(model, Gemma) else model
    _check_length(subject, len(tokens), left_padding, new_tokens)
    ids, padding = _padded(subject, tokens, left_padding)
    how = Continuation(
        new_tokens=new_tokens,
        sampling=sampling or Sampling(),
        padding=padding,
        mask=mask,
        every_logit=bool(every_logit or reference),
    )
    case = asdict(how.sampling) | {"left_padding": left_padding, **subject.facts, **(facts or {})}
    if new_tokens > 1:
        case["new_tokens"] = new_tokens
    seen: list[Tensor] = []  # the logits of the last step

    def saw(logits: Tensor) -> bool:
        seen[:] = [logits]
        with unrecorded():
            return not bool(logits[:, -1].isfinite().all())

    error: RuntimeError | None = None
    try:
        with torch.inference_mode(), ExitStack() as stack:
            if progress is not None:
                _announce(subject.layers, new_tokens, progress, stack)
            recording = stack.enter_context(
                record(
                    subject.module,
                    matmul=matmul,
                    against=None if reference is None else reference.tensors,
                    token_text=subject.piece,
                    case=case,
                    **options,
                )
            )
            subject.decode(ids, how, saw)
    except RuntimeError as raised:
        if not seen:
            raise
        error = raised
    (logits,) = seen[0]
    token = int(logits[-1].argmax())
    text, logit = subject.piece(token), float(logits[-1, token])
    told = {} if options.get("redact") else {"next_text": text}
    if not math.isfinite(logit):
        told |= {"greedy_text": text, "greedy_logit": str(logit)}
    recording.header = replace(
        recording.header,
        weights=weights,
        logits_error=None if reference is None else logits_error(logits, reference.logits),
        reference=None if reference is None else str(reference.logits.dtype).removeprefix("torch."),
        case={**recording.header.case, **told},
    )
    return Run(recording=find_stored_dtypes(recording, subject, *ids.shape), error=error)


def _check_length(subject: Subject, tokens: int, left_padding: int, new_tokens: int) -> None:
    if not tokens:
        raise MisuseError("A prompt needs at least one token: write some text, or leave <bos> on.")
    length = left_padding + tokens
    if length + new_tokens - 1 > subject.context:
        more = f", and {new_tokens:,} new ones" if new_tokens > 1 else ""
        raise MisuseError(
            f"The prompt does not fit the model's context of {subject.context:,} tokens: it has {length:,}{more}. "
            "Shorten it."
        )


def _padded(subject: Subject, tokens: Sequence[int], left_padding: int) -> tuple[Tensor, Tensor | None]:
    """Token ids [1, T] after so many pad tokens, and [1, T], True where a real one stands; None where all are."""
    ids = torch.tensor([[subject.pad] * left_padding + list(tokens)], device=subject.device)
    real = torch.arange(ids.shape[1], device=subject.device)[None] >= left_padding
    return ids, real if left_padding else None


def run_dtypes(
    subject_in: Callable[[str, Callable[[int, int], None]], Subject],
    tokens: Sequence[int],
    dtypes: Sequence[str],
    *,
    new_tokens: int = 1,
    left_padding: int = 0,
    sampling: Sampling | None = None,
    matmul: str | None = None,
    weights: Mapping[str, StoredWeights] | None = None,
    facts: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> list[Run]:
    """The same case in each dtype, in the order given; `subject_in(dtype, progress)` makes the model to run.

    `matmul` is how products are computed, for each dtype what is fast and accurate on its device unless given.

    The widest of float32 and float64 runs last, wherever it stands. It watches the elements at which the others broke
    first, for their reference values, and it is what all their tensors are compared with, as far as copies of them fit
    in 1 GiB: the `deviation` of every site that both have. Without one of the two there is no reference: neither
    float16 nor bfloat16 holds the other's numbers. Each model is dropped before the next is made.
    """
    runs: dict[str, Run] = {}
    watch: list[tuple[str, int]] = []
    options["watch"] = watch
    reference = reference_of(dtypes)
    kept: dict[str, Copies] = {}
    room = _ROOM
    for dtype in sorted(set(dtypes), key=lambda name: (name == reference, dtypes.index(name))):
        if reference is not None:
            own = kept[dtype] = Copies(room)
            options["copies"] = None if dtype == reference else own
            options["compared"] = [kept[name] for name in runs] if dtype == reference else []

        def announce(what: str, done: int, total: int, dtype: str = dtype) -> None:
            if progress is not None:
                progress(f"{dtype}: {what}", done, total)

        subject = subject_in(dtype, stage("preparing weights", announce))
        runs[dtype] = run_case(
            subject,
            tokens,
            new_tokens=new_tokens,
            left_padding=left_padding,
            sampling=sampling,
            matmul=matmul or preferred_matmul(dtype, subject.device.type),
            weights=(weights or {}).get(dtype),
            facts=facts,
            progress=announce,
            **options,
        )
        first = runs[dtype].recording.first_break()
        if first is not None and first.broke_at is not None:
            watch.append((first.site, first.broke_at))
        room = kept[dtype].room if dtype in kept else room
    if reference is not None:
        wide = runs[reference].recording
        for dtype in runs.keys() - {reference}:
            runs[dtype] = replace(runs[dtype], recording=kept[dtype].told(runs[dtype].recording, wide))
    return [runs[dtype] for dtype in dtypes]


def reference_of(dtypes: Iterable[str]) -> str | None:
    """Which of them is what the others are judged by: float64, else float32, else none."""
    return next((name for name in ("float64", "float32") if name in dtypes), None)


def _announce(layers: Sequence[nn.Module], passes: int, progress: Progress, stack: ExitStack) -> None:
    total, done = len(layers) * passes, 0

    def hook(module: Any, args: Any, output: Any) -> None:
        nonlocal done
        done += 1
        progress("running layers", done, total)

    for layer in layers:
        stack.callback(layer.register_forward_hook(hook).remove)
