"""One case: a model, a prompt, one forward pass and one sampling step, recorded and compared with a reference."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.errors import MisuseError
from stabilitykit.gemma import Gemma, build
from stabilitykit.gemma.matmul import Matmul, matmul
from stabilitykit.gemma.model import RoundingName
from stabilitykit.recorder import record
from stabilitykit.records import Level, LogitsError, Recording

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and out of how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """gemma_pytorch's defaults; `temperature` None is greedy. `seed` is that of the draw."""

    temperature: float | None = 1.0
    top_p: float = 0.95
    top_k: int = 64
    seed: int = 0


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


def run_reference(model: Gemma, tokens: Sequence[int]) -> Reference:
    """One pass whose tensors are kept for others to be compared with; as much memory as the modules' outputs take."""
    tensors: dict[str, Tensor] = {}
    with torch.inference_mode(), record(model, detail="peaks", formats=(), keep=tensors):
        logits = model(torch.tensor([tokens], device=model.device))
    return Reference(tensors=tensors, logits=logits[0])


def logits_error(logits: Tensor, reference: Tensor, *, chunk: int = 32) -> LogitsError:
    """`LogitsError` of logits [L, V] against those of the reference run, in float64, `chunk` positions at a time."""
    divergences: list[Tensor] = []
    same = 0
    for start in range(0, len(logits), chunk):
        ours, theirs = (part[start : start + chunk] for part in (logits, reference))
        sound = ours.isfinite().all(-1) & theirs.isfinite().all(-1)
        q, p = (part[sound].double().log_softmax(-1) for part in (ours, theirs))
        divergences.append((p.exp() * (p - q)).sum(-1))
        same += int((ours[sound].argmax(-1) == theirs[sound].argmax(-1)).sum())
    divergence = torch.cat(divergences)
    compared = divergence.numel()
    return LogitsError(
        kl_mean=float(divergence.mean()) if compared else None,
        kl_max=float(divergence.max()) if compared else None,
        top1=same / compared if compared else None,
        compared=compared,
        positions=len(logits),
    )


def run_case(
    model: Gemma,
    tokens: Sequence[int],
    *,
    left_padding: int = 0,
    mask: Tensor | None = None,
    sampling: Sampling | None = None,
    level: Level = "operators",
    kind: Matmul = "native",
    position_peaks: bool = False,
    every_logit: bool = False,
    reference: Reference | None = None,
    watch: Sequence[tuple[str, int]] = (),
    redact: bool = False,
    token_text: Callable[[int], str] | None = None,
    facts: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Runs `tokens`, after `left_padding` pad tokens, and draws one token; recorded throughout.

    `mask` replaces the model's own, as in its `forward`. `kind` is how products are computed. `every_logit` makes
    and records the logits of all positions; with a `reference` they are compared with its. `facts` join what the
    header's `case` says, and so does `next_text`, the token that greedy decoding takes, unless redacted. Raises
    MisuseError for no tokens or more than the model's context; an error of the sampler is returned, any other raised.
    """
    sampling = sampling or Sampling()
    length = left_padding + len(tokens)
    if not tokens:
        raise MisuseError("A prompt has at least one token; this one has none. Write some text, or leave <bos> on.")
    if length > model.config.context:
        raise MisuseError(
            f"A prompt fits the model's context of {model.config.context:,} tokens; this has {length:,}: shorten it."
        )
    pad = 0 if model.vocabulary is None else model.vocabulary.pad
    ids = torch.tensor([[pad] * left_padding + list(tokens)], device=model.device)
    padding = None
    if left_padding:
        padding = torch.arange(length, device=model.device)[None] >= left_padding
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    case = asdict(sampling) | {
        "left_padding": left_padding,
        "rounding": model.rounding,
        "stress": model.stress,
        **(facts or {}),
    }
    logits: Tensor | None = None
    error: RuntimeError | None = None
    try:
        with torch.inference_mode(), matmul(kind), ExitStack() as stack:
            if progress is not None:
                _announce_layers(model, progress, stack)
            recording = stack.enter_context(
                record(
                    model,
                    level=level,
                    position_peaks=position_peaks,
                    against=None if reference is None else reference.tensors,
                    matmul=kind,
                    watch=watch,
                    token_text=token_text,
                    redact=redact,
                    case=case,
                )
            )
            logits = model(ids, padding=padding, mask=mask, last_only=not (every_logit or reference))
            model.sampler(
                logits[:, -1],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                generator=generator,
            )
    except RuntimeError as raised:
        if logits is None:
            raise
        error = raised
    if reference is not None:
        error_found = logits_error(logits[0], reference.logits)
        recording.header = replace(recording.header, logits_error=error_found)
    greedy = int(logits[0, -1].argmax())
    text = (token_text or (str if model.tokenizer is None else model.tokenizer.piece))(greedy)
    told = {} if redact else {"next_text": text}
    if not bool(logits[:, -1].isfinite().all()):
        told["greedy_text"] = text
    recording.header = replace(recording.header, case={**recording.header.case, **told})
    return Run(recording=recording, error=error)


def run_dtypes(
    checkpoint: Checkpoint,
    tokens: Sequence[int],
    dtypes: Sequence[str],
    *,
    device: str = "cpu",
    rounding: RoundingName = "transformers",
    stress: float = 1.0,
    left_padding: int = 0,
    sampling: Sampling | None = None,
    level: Level = "operators",
    redact: bool = False,
    token_text: Callable[[int], str] | None = None,
    facts: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Run]:
    """The same case in each dtype, in the order given.

    float32 runs last, wherever it stands, and watches the elements at which the others broke first: their
    reference values.
    """
    runs: dict[str, Run] = {}
    watch: list[tuple[str, int]] = []
    for dtype in sorted(set(dtypes), key=lambda name: (name == "float32", dtypes.index(name))):

        def announce(done: int, total: int, dtype: str = dtype) -> None:
            if progress is not None:
                progress(f"{dtype}: preparing weights", done, total)

        def announce_layer(what: str, done: int, total: int, dtype: str = dtype) -> None:
            if progress is not None:
                progress(f"{dtype}: {what}", done, total)

        model = build(checkpoint, dtype=dtype, device=device, rounding=rounding, stress=stress, progress=announce)
        runs[dtype] = run_case(
            model,
            tokens,
            left_padding=left_padding,
            sampling=sampling,
            level=level,
            watch=watch,
            redact=redact,
            token_text=token_text,
            facts=facts,
            progress=announce_layer,
        )
        first = runs[dtype].recording.first_break()
        if first is not None and first.broke_at is not None:
            watch.append((first.site, first.broke_at))
    return [runs[dtype] for dtype in dtypes]


def _announce_layers(model: Gemma, progress: Progress, stack: ExitStack) -> None:
    total = len(model.layers)
    for done, layer in enumerate(model.layers, start=1):

        def hook(module: Any, args: Any, output: Any, done: int = done) -> None:
            progress("running layers", done, total)

        stack.callback(layer.register_forward_hook(hook).remove)
