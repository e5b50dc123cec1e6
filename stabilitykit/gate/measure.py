"""One prompt, run in the dtype: what leaves the range, every site's headroom, and how far it is from float32."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stabilitykit.diagnosis.cause import cause
from stabilitykit.diagnosis.layers import stored
from stabilitykit.diagnosis.sentences import dependence, first_sentence
from stabilitykit.errors import MisuseError, StabilityKitError
from stabilitykit.formats import number_format
from stabilitykit.gate.inputs import sha256_of
from stabilitykit.gate.limits import least_by_site
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.matmul import matmul, preferred_matmul
from stabilitykit.models.subject import Subject
from stabilitykit.recorder import record
from stabilitykit.records import Recording
from stabilitykit.records.gate import CheckedPrompt, SiteHeadroom, Violation
from stabilitykit.remedies.nearness import Probabilities, nearness
from stabilitykit.remedies.samples import Answer, answer
from stabilitykit.run.case import Progress
from stabilitykit.run.every_length import every_length
from stabilitykit.words import counted

_FEW = 16  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a model is given: one row of tokens, or `given`, tensors by the names of its arguments."""

    name: str
    tokens: tuple[int, ...] | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """As the arguments of one call."""
        return self.given if self.tokens is None else {"input_ids": torch.tensor([list(self.tokens)])}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """`sites` have the least headroom first; `broke` says what left the range, each site once."""

    prompt: CheckedPrompt
    sites: tuple[SiteHeadroom, ...]
    broke: tuple[Violation, ...]


def measure(
    subject: Subject, ask: Ask, dtype: str, progress: Progress | None = None, *, redact: bool = False
) -> Measured:
    """Runs `ask` up to the first break: a row of tokens at every length, tensors as they are.

    `redact` keeps tokens out of what is found. Raises MisuseError for what the model cannot be called with, that is
    longer than its context, or that ends in an error: nothing can be said of it then.
    """
    kind = preferred_matmul(dtype, subject.device.type)
    recordings: dict[int, Recording] = {}  # by length
    every, shortest = False, None
    with _judged(ask.name):
        if ask.tokens is None:
            _check_numbers(ask)
            _check_ids(ask, subject)
            with torch.inference_mode(), _recorded(subject, kind, redact=redact) as recording:
                _answer(subject, ask)
            recordings[0] = recording
        else:
            if len(ask.tokens) > subject.context:
                raise MisuseError(
                    f"{ask.name} has {len(ask.tokens):,} tokens, and the model's context holds {subject.context:,}; "
                    "shorten it."
                )
            _check_ids(ask, subject)
            found = every_length(
                subject,
                ask.tokens,
                edges=not isinstance(subject.module, Gemma),  # which is causal, as its own tests show
                matmul=kind,
                redact=redact,
                seen=recordings.__setitem__,
                progress=_named(ask.name, progress),
            )
            every = all(check.agrees for check in found.checks) and _looks_back(subject, ask.tokens)
            shortest = found.first_broken if every else None
    if not any(len(one) for one in recordings.values()):
        raise MisuseError(f"{ask.name}: nothing that the model computes could be recorded, so nothing can be said.")
    sites = least_by_site(site for one in recordings.values() for site in _sites(one, ask.name, dtype))
    broken = [(length, one) for length, one in sorted(recordings.items()) if one.first_break() is not None]
    least = next(iter(sites), None)
    prompt = CheckedPrompt(
        name=ask.name,
        sha256=sha256_of(ask.inputs),
        tokens=_count(ask),
        every_length=every,
        first_broken=shortest,
        headroom=None if least is None else least.headroom,
        site=None if least is None else least.site,
    )
    return Measured(prompt=prompt, sites=sites, broke=tuple(_violations(broken, ask.name, shortest)))


def compared(prompt: CheckedPrompt, ask: Ask, low: Subject, wide: Subject, dtype: str) -> CheckedPrompt:
    """`prompt` with the divergence of `low`'s next-token distributions from those of `wide`, which is in float32.

    Raises MisuseError for a model that returns no logits, and where those of float32 are not finite either.
    """
    logits = []
    with _judged(ask.name):
        for subject, name in ((low, dtype), (wide, "float32")):
            with torch.inference_mode(), matmul(preferred_matmul(name, subject.device.type)):
                found = _answer(subject, ask)
            if not found.logits:
                raise MisuseError(
                    f"{ask.name}: the model returns no logits, and a KL divergence is one of logits; leave out "
                    "--max-kl. --min-headroom goes with any model."
                )
            logits.append(found.values.reshape(-1, found.values.shape[-1]))
        ours, theirs = logits
        if not bool(theirs.isfinite().all()):
            raise MisuseError(f"{ask.name}: float32 itself does not stay finite, so there is nothing to compare with.")
        near = nearness(ours, Probabilities.of(theirs)).kl
    there = bool(len(near))
    return replace(
        prompt,
        kl_mean=float(near.mean()) if there else None,
        kl_max=float(near.max()) if there else None,
        compared=len(near),
        positions=len(ours),
    )


def _recorded(subject: Subject, kind: str, *, redact: bool) -> Any:
    return record(subject.module, formats=(), stop_at_break=True, matmul=kind, token_text=subject.piece, redact=redact)


def _answer(subject: Subject, ask: Ask) -> Answer:
    try:
        return answer(subject.module, ask.inputs)
    except MisuseError as error:
        raise MisuseError(f"{ask.name} could not be run: {error}") from error


def _looks_back(subject: Subject, tokens: Sequence[int]) -> bool:
    """Whether no answer depends on a later token: with another last token, all before it are the same bits.

    Seen on the first few tokens. A single one has nothing before it.
    """
    if isinstance(subject.module, Gemma) or len(tokens) < 2:
        return True
    row = torch.tensor([list(tokens[:_FEW])])
    other = row.clone()
    other[0, -1] = 1 if row[0, -1] == 0 else 0
    with torch.inference_mode():
        one, two = (answer(subject.module, {"input_ids": ids}).values for ids in (row, other))
    if one.ndim < 3:  # one answer for all of a text
        return False
    return bool(torch.equal(one[:, :-1].nan_to_num(), two[:, :-1].nan_to_num()))


@contextmanager
def _judged(name: str) -> Iterator[None]:
    """Inside the block whatever is raised becomes a MisuseError: of a run that ends in an error nothing can be said."""
    try:
        yield
    except StabilityKitError:
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0][:300]
        raise MisuseError(
            f"{name} could not be judged, because its run ended in {type(error).__name__}: {said}"
        ) from error


def _check_numbers(ask: Ask) -> None:
    for name, one in ask.given.items():
        if one.is_floating_point() and bool(one.isnan().any()):
            raise MisuseError(f"{ask.name}: {name} holds NaN to begin with, so that nothing can be said of the model.")


def _check_ids(ask: Ask, subject: Subject) -> None:
    """Raises MisuseError for a token that the embedding has no row of."""
    ids, module = ask.inputs.get("input_ids"), subject.module
    embedding = getattr(module, "get_input_embeddings", None)
    table = module.embed_tokens if isinstance(module, Gemma) else embedding() if callable(embedding) else None
    rows = getattr(getattr(table, "weight", None), "shape", (None,))[0]
    if ids is None or rows is None or not ids.numel() or ids.is_floating_point():
        return
    for one in (int(ids.min()), int(ids.max())):
        if not 0 <= one < rows:
            raise MisuseError(
                f"{ask.name}: input_ids holds {one:,}, and the model knows the tokens 0 to {rows - 1:,}. Does it come "
                "from another model's tokenizer?"
            )


def _named(name: str, progress: Progress | None) -> Progress | None:
    if progress is None:
        return None

    def announce(what: str, done: int, total: int) -> None:
        progress(f"{name}, {what}", done, total)

    return announce


def _count(ask: Ask) -> int | None:
    if ask.tokens is not None:
        return len(ask.tokens)
    ids = ask.given.get("input_ids")
    return None if ids is None else ids.numel()


def _sites(recording: Recording, prompt: str, dtype: str) -> list[SiteHeadroom]:
    """Of every tensor that is stored in the dtype; one of which a mask hides everything has none."""
    form = number_format(dtype)
    found = []
    for one in stored(recording):
        broke = one.broke
        if broke is None and one.masked == one.elements:
            continue
        position, token = one.amax_position, one.amax_token_text
        amax = one.amax or 0.0
        headroom = form.headroom(amax)
        if broke is not None:
            position, token, headroom = broke.position, recording.header.text_of(broke.token), -math.inf
            if broke.kind == "overflow" and broke.value is not None and math.isfinite(broke.value):
                amax = abs(broke.value)
                headroom = form.headroom(amax)
        site = SiteHeadroom(
            site=one.site, label=one.label, layer=one.layer, amax=amax, headroom=headroom, prompt=prompt,
            position=position, token=token,
        )  # fmt: skip
        found.append(site)
    return found


def _violations(broken: list[tuple[int, Recording]], prompt: str, shortest: int | None) -> list[Violation]:
    """One for each site at which something breaks first, at whatever length; the shortest length's first."""
    found: dict[str, Violation] = {}
    for _, recording in broken:
        first = recording.first_break()
        assert first is not None
        assert first.broke is not None
        why = cause(recording)
        told = [first_sentence(recording, first), why.sentence if why is not None and why.shown else ""]
        told += [dependence(recording, first), "" if why is None else why.remedy]
        if not found and shortest is not None and shortest > 1:
            told.insert(1, f"It does so from a length of {counted(shortest, 'token')} on.")
        found.setdefault(
            first.site,
            Violation(
                limit="range",
                text=" ".join(part for part in told if part),
                site=first.site,
                label=first.label,
                layer=first.layer,
                value=first.broke.value,
                bound=first.broke.limit,
                prompts=(prompt,),
            ),
        )
    return list(found.values())


def tokenizer_of(subject: Subject) -> Any:
    """What reads texts for the model; None where it came without."""
    return subject.module.tokenizer if isinstance(subject.module, Gemma) else getattr(subject, "tokenizer", None)
