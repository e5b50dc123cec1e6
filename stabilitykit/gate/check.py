"""Whether a model keeps its limits in a dtype: its weights first, then prompts, every length at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import Tensor

from stabilitykit.checkpoints.huggingface import CONFIG
from stabilitykit.errors import MisuseError
from stabilitykit.gate.baseline import differences, missing, read_baseline
from stabilitykit.gate.inputs import Tensors, Text, read_prompts
from stabilitykit.gate.limits import (
    check_limits,
    least_by_site,
    merged,
    of_baseline,
    of_headroom,
    of_kl,
    of_outputs,
    of_weights,
)
from stabilitykit.gate.measure import Ask, Measured, compared, measure, tokenizer_of
from stabilitykit.models import transformers as hf
from stabilitykit.models.devices import parse_dtype
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.machine import machine, versions
from stabilitykit.models.subject import Subject
from stabilitykit.models.transformers.backend import PREFIX
from stabilitykit.recorder.weights import check_weights
from stabilitykit.records.gate import Baseline, Gate, Limits
from stabilitykit.remedies.samples import as_inputs
from stabilitykit.run.batch import Asked
from stabilitykit.run.case import Progress, stage
from stabilitykit.run.source import SourceOptions, SubjectIn, checkpoint_of, counting, open_source
from stabilitykit.run.windows import KINDS, beginning, texts
from stabilitykit.words import listed

_ANY = "a"  # a source is opened for a prompt; the prompts that are checked come later


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A checkpoint's weights as stored, and the model; `source` reads texts, None for tensors alone."""

    tensors: Iterable[tuple[str, Tensor]]
    bytes: int
    blocks: Mapping[str, int]
    subject_in: SubjectIn | None = None
    read: Any = None


def check(
    checkpoint: str | Path | Gemma | Subject,
    *,
    dtype: str = "float16",
    min_headroom: float | None = None,
    max_kl: float | None = None,
    prompts: Sequence[str | Path] = (),
    baseline: str | Path | Baseline | None = None,
    tolerance: float = 0.5,
    weights_only: bool = False,
    redact: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
    **how: Unpack[SourceOptions],
) -> Gate:
    """Whether the model keeps its limits in `dtype`, on `prompts`. Without limits nothing may leave the range.

    The weights are looked at first: what is not finite, and what the dtype does not hold. Where they fail nothing runs.
    Then every prompt runs up to its first break, and is judged at every length at once.

    Args:
        checkpoint: as in `profile`; of an open model the dtype is its own.
        dtype: float16, bfloat16 or float32.
        min_headroom: bits that each stored tensor must keep below the dtype's maximum.
        max_kl: the largest mean KL divergence from float32's next-token distributions, in nats a token, of any prompt.
            Given alone, what overflows on the way and comes out finite is judged by it; else that violates the range.
        prompts: files, or folders of them: .txt and .md are texts, .json and .jsonl chats or prompts, .npz,
            .safetensors and .pt tensors by the names of the model's arguments. Three texts of up to 512 tokens (prose,
            code, many scripts) unless given.
        baseline: what an earlier check kept, or the file. A loss of more than `tolerance` bits at any site violates.
        weights_only: run nothing; goes with no limit, prompts or baseline.
        redact: keep the tokens of prompts out of the result. The names of their files and their SHA-256 stay.
        command: kept in the result.
        progress: called with (what is done, how much of it, out of how much).
        bos, chat, system, special_tokens, device, rounding, rescale, attention, adapter, trust_remote_code, stream: as
            in `profile`.

    Returns:
        A Gate: `holds`, the `violations` with site and numbers, and the `headroom` of each site.

    Raises:
        MisuseError: for what is wrong with an argument, and where nothing can be said: a run that ends in an error, a
            baseline of another dtype.
        CheckpointError: for a checkpoint that cannot be read.

    >>> tiny = "random:gemma3-270m?layers=1&hidden_size=32&feed_forward=64&heads=2&head_dim=16&context=64"
    >>> check(tiny).holds, check(tiny, rescale=65536.0).holds
    (True, False)
    >>> check(tiny, rescale=65536.0).violations[0].site
    'embed_tokens'
    """
    parse_dtype(dtype)
    limits = Limits(min_headroom=min_headroom, max_kl=max_kl, tolerance=tolerance)
    check_limits(limits)
    if how.get("system") is not None and not how.get("chat"):
        raise MisuseError("A system text is part of the turn template; add chat=True.")
    if baseline is not None and not isinstance(baseline, Baseline):
        baseline = read_baseline(Path(baseline))
    if baseline is not None and baseline.dtype != dtype:
        raise MisuseError(
            f"The baseline is one of {baseline.dtype}, and this check is in {dtype}; write another one with "
            "--write-baseline."
        )
    if weights_only and (prompts or baseline is not None or limits.max_kl is not None or min_headroom is not None):
        raise MisuseError(
            "--weights-only runs nothing, so prompts, a baseline, --max-kl and --min-headroom would go unseen; leave "
            "them out, or leave out --weights-only."
        )
    asked = read_prompts([Path(place) for place in prompts])
    opened = _weights(checkpoint) if weights_only else _open(checkpoint, asked, progress, how)
    weights = check_weights(opened.tensors, [dtype], counting(progress, opened.bytes), blocks=opened.blocks)[dtype]
    lost = of_weights(weights)
    name = checkpoint if isinstance(checkpoint, str | Path) else checkpoint_name(checkpoint)
    gate = Gate(
        checkpoint=str(name),
        sha256=None,
        command=command,
        versions=_versions(str(name)),
        machine=machine(str(how.get("device", "cpu"))),
        dtype=dtype,
        limits=limits,
        weights=weights,
        violations=tuple(lost),
        ran=not (lost or weights_only),
    )
    if not gate.ran or opened.subject_in is None:
        return gate
    return _run(gate, opened, asked, baseline, progress, how, redact=redact)


def _run(
    gate: Gate,
    opened: _Opened,
    asked: Sequence[Text | Tensors],
    baseline: Baseline | None,
    progress: Progress | None,
    how: SourceOptions,
    *,
    redact: bool,
) -> Gate:
    assert opened.subject_in is not None
    dtype, limits = gate.dtype, gate.limits
    subject = opened.subject_in(dtype, stage(f"{dtype}: preparing weights", progress))
    asks = [_ask(one, opened, how) for one in asked] if asked else _default(subject, bos=how.get("bos", True))
    asks = [_whole_row(one, subject) for one in asks]
    found = [measure(subject, one, dtype, progress, redact=redact) for one in asks]
    if limits.max_kl is not None:
        found = _compared(found, asks, subject, opened.subject_in, dtype, progress)
    ran = [one.prompt for one in found]
    sites = least_by_site(site for one in found for site in one.sites)
    every = [site for one in found for site in one.sites]
    judged = [one for one in found if limits.keeps_range or one.prompt.compared < one.prompt.positions]
    violations = [broke for one in judged for broke in one.broke] + of_outputs(ran, dtype)
    if limits.min_headroom is not None:
        violations += of_headroom(every, limits.min_headroom, dtype)
    if limits.max_kl is not None:
        violations += of_kl(ran, limits.max_kl)
    gate = replace(
        gate,
        checkpoint=subject.source,
        sha256=subject.sha256,
        notes=subject.notes,
        prompts=tuple(ran),
        headroom=sites,
        remarks=tuple(_remarks(ran)),
    )
    if baseline is not None:
        violations += of_baseline(sites, baseline, limits.tolerance)
        gone = missing(gate, baseline)
        gate = replace(
            gate,
            compared=True,
            differences=differences(gate, baseline),
            remarks=(*gate.remarks, *([gone] if gone else [])),
        )
    return replace(gate, violations=tuple(merged(violations)))


def _compared(
    found: Sequence[Measured],
    asks: Sequence[Ask],
    subject: Subject,
    subject_in: SubjectIn,
    dtype: str,
    progress: Progress | None,
) -> list[Measured]:
    wide = subject_in("float32", stage("float32: preparing weights", progress))
    announce, made = stage("comparing with float32", progress), []
    for number, (one, ask) in enumerate(zip(found, asks, strict=True), start=1):
        made.append(replace(one, prompt=compared(one.prompt, ask, subject, wide, dtype)))
        announce(number, len(asks))
    return made


def _remarks(ran: Sequence[Any]) -> list[str]:
    """What the result does not cover."""
    only = [one.name for one in ran if not one.every_length]
    if not only:
        return []
    what = "its own length was" if len(only) == 1 else "their own lengths were"
    return [f"only {what} judged of {listed(only, 3)}: shorter ones may differ"]


def _ask(one: Text | Tensors, opened: _Opened, how: SourceOptions) -> Ask:
    if isinstance(one, Tensors):
        return Ask(name=one.name, given=one.given)
    is_plain = how.get("chat") and not one.asked.chat  # a chat of a file's has its own system text
    asked = replace(one.asked, chat=True, system=how.get("system")) if is_plain else one.asked
    try:
        return Ask(name=one.name, tokens=tuple(opened.read(asked)))
    except MisuseError as error:
        raise MisuseError(f"{one.name} cannot be read: {error}") from error


def _whole_row(ask: Ask, subject: Subject) -> Ask:
    """As tensors where the model has an encoder beside its decoder, so that a text has no beginnings to judge."""
    if ask.tokens is None or not getattr(getattr(subject.module, "config", None), "is_encoder_decoder", False):
        return ask
    return Ask(name=ask.name, given=as_inputs(subject, ask.tokens))


def _default(subject: Subject, *, bos: bool) -> list[Ask]:
    """A window of each of the kit's own texts, after what the tokenizer puts before one."""
    tokenizer = tokenizer_of(subject)
    if tokenizer is None:
        raise MisuseError(
            f"{subject.source} came without a tokenizer, so no text can be run. Give it tensors by the names of its "
            "arguments with --prompts FILE: .npz, .safetensors or .pt."
        )
    begin = len(beginning(tokenizer))
    windows = texts(subject.context, tokenizer).choosing
    return [
        Ask(name=kind, tokens=window if bos else window[begin:]) for kind, window in zip(KINDS, windows, strict=True)
    ]


def _weights(checkpoint: str | Path | Gemma | Subject) -> _Opened:
    """The stored weights alone, of a folder as its files have them, whatever model they are of."""
    if not isinstance(checkpoint, str | Path):
        raise MisuseError("Only the weights of a checkpoint that has a name are checked alone, not of an open model.")
    name = str(checkpoint)
    folder = name.removeprefix(PREFIX)
    if name.startswith(PREFIX) or (Path(folder) / CONFIG).is_file():
        return _Opened(tensors=hf.stored_tensors(folder), bytes=hf.stored_bytes(folder), blocks={})
    found = checkpoint_of(checkpoint)
    size = sum(tensor.nbytes for tensor in found.tensors.values())
    return _Opened(tensors=found.tensors.items(), bytes=size, blocks=found.blocks)


def _open(
    checkpoint: str | Path | Gemma | Subject,
    asked: Sequence[Text | Tensors],
    progress: Progress | None,
    how: SourceOptions,
) -> _Opened:
    name = str(checkpoint) if isinstance(checkpoint, str | Path) else ""
    if name.startswith(PREFIX):
        folder, trust = name.removeprefix(PREFIX), how.get("trust_remote_code", False)
        texts = any(isinstance(one, Text) for one in asked)
        if (asked and not texts) or not hf.continues_text(folder, trust_remote_code=trust):
            return _whole(folder, how, texts=texts)
    plain: SourceOptions = {**how, "chat": False, "system": None}
    source = open_source(checkpoint, _ANY, progress=progress, **plain)
    return _Opened(
        tensors=source.tensors, bytes=source.bytes, blocks=source.blocks, subject_in=source.subject_in, read=source.read
    )


def _whole(name: str, how: SourceOptions, *, texts: bool) -> _Opened:
    """A model of transformers' as its config names it, whatever it reads. `texts`: its tokenizer is needed."""
    if how.get("rescale", 1.0) != 1.0:
        raise MisuseError("A model of this kind, or one that is checked on tensors, runs as it is; leave out --stress.")
    kept = ("attention", "adapter", "trust_remote_code", "stream")
    options: dict[str, Any] = {key: value for key, value in how.items() if key in kept}
    options["stream"] = options.get("stream") or None
    device = how.get("device", "cpu")
    return _Opened(
        tensors=hf.stored_tensors(name),
        bytes=hf.stored_bytes(name),
        blocks={},
        read=_reader(name, how) if texts else None,
        subject_in=lambda dtype, announce: hf.open_model(
            name, dtype=dtype, device=device, whole=True, progress=announce, **options
        ),
    )


def _reader(name: str, how: SourceOptions) -> Callable[[Asked], list[int]]:
    tokenizer = hf.open_tokenizer(name, trust_remote_code=how.get("trust_remote_code", False))
    kept = {"bos": how.get("bos", True), "special_tokens": how.get("special_tokens", False)}

    def read(asked: Asked) -> list[int]:
        if asked.chat:
            return tokenizer.chat(asked.text, system=asked.system, earlier=asked.earlier, **kept)
        return tokenizer.encode(asked.text, **kept)

    return read


def checkpoint_name(subject: Gemma | Subject) -> str:
    """Where an open model comes from."""
    return str(subject.source)


def _versions(name: str) -> dict[str, str]:
    found = versions() | {"numpy": np.__version__}
    return found | {"transformers": version("transformers")} if name.startswith(PREFIX) else found
