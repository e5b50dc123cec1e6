"""What a run needs of a checkpoint, whoever runs it: a prompt's tokens, a model in each dtype, the stored weights."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import Tensor

from stabilitykit.checkpoints import Checkpoint, open_checkpoint
from stabilitykit.checkpoints.hub import local_folder
from stabilitykit.checkpoints.huggingface import WITH_TRANSFORMERS
from stabilitykit.choices import Attention, RoundingName
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models import transformers as hf
from stabilitykit.models.devices import parse_device
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.models.gemma.footprint import beside_weights
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.matmul import preferred_matmul
from stabilitykit.models.subject import Subject
from stabilitykit.models.transformers.backend import PREFIX
from stabilitykit.recorder.weights import role_of
from stabilitykit.run.batch import Asked
from stabilitykit.run.case import Progress, stage
from stabilitykit.run.inputs import Tensors, reader, row_of
from stabilitykit.run.open import check_options
from stabilitykit.scaling.apply import scaled
from stabilitykit.scaling.stress import stress_of_gemma
from stabilitykit.scaling.stressed import StressedFolder

_ANY = "a"  # a source is opened for a prompt, and a row of tokens comes in its place

SubjectIn = Callable[[str, Callable[[int, int], None]], Subject]
"""The model in a dtype; the second argument is called with how much of it is done, and out of how much."""


class ModelOptions(TypedDict, total=False):
    """How a checkpoint becomes a model; `open_model` says what each means."""

    device: str
    rounding: RoundingName
    rescale: float
    attention: Attention | None
    adapter: str | Path | None
    trust_remote_code: bool
    stream: bool


class SourceOptions(ModelOptions, total=False):
    """How a prompt becomes tokens, too; `profile` says what each means."""

    bos: bool
    chat: bool
    system: str | None
    special_tokens: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A prompt's `tokens`, and `read` for those of others; what a token says; the model in a dtype; `tensors` are the
    weights as stored.

    `bytes` is their size, `blocks` as in a Checkpoint. `dtypes` are those to run in unless others are asked for.
    `given` are tensors that one forward pass takes in place of tokens.
    """

    tokens: list[int]
    read: Callable[[Asked], list[int]]
    piece: Callable[[int], str]
    subject_in: SubjectIn
    tensors: Iterable[tuple[str, Tensor]]
    bytes: int
    blocks: Mapping[str, int] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float16",)
    given: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    asked: Asked
    bos: bool
    special_tokens: bool

    def reader(self, encode: Callable[..., list[int]], turn: Callable[..., list[int]]) -> Callable[[Asked], list[int]]:
        """How this prompt, and others like it, become tokens."""
        return reader(encode, turn, bos=self.bos, special_tokens=self.special_tokens)


def checkpoint_of(checkpoint: str | Path | Checkpoint, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint for the kit's own model; `hf:` names a folder too, which it computes as transformers does."""
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    if not str(checkpoint).startswith(PREFIX):
        return open_checkpoint(checkpoint, progress=stage("reading weights", progress))
    try:
        return open_checkpoint(local_path(checkpoint), progress=stage("reading weights", progress))
    except CheckpointError as error:  # who wrote hf: needs no advice to write it
        why = str(error).partition(WITH_TRANSFORMERS)[0].strip()
        raise CheckpointError(f"{why} `check`, `profile`, `search` and `repair` have transformers run it.") from error


def opened_by(
    checkpoint: str | Path | Checkpoint | hf.HuggingFaceFolder, progress: Progress | None = None
) -> Checkpoint | hf.HuggingFaceFolder:
    """The checkpoint for the kit's own model; the folder where `hf:` names one that only transformers runs: of a family
    other than Gemma 1 to 3, or with a tokenizer or a head that no released Gemma has.

    Raises as `open_checkpoint` and `hf.open_folder` do.
    """
    if isinstance(checkpoint, hf.HuggingFaceFolder):
        return checkpoint
    try:
        return checkpoint_of(checkpoint, progress)
    except CheckpointError:
        if isinstance(checkpoint, Checkpoint) or not str(checkpoint).startswith(PREFIX):
            raise
        return hf.open_folder(str(checkpoint).removeprefix(PREFIX), stage("reading weights", progress))


def local_path(checkpoint: str | Path) -> Path:
    """The path that a name stands for, `hf:` names being looked up in the local Hugging Face cache."""
    name = str(checkpoint)
    return local_folder(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else Path(name)


def open_source(
    checkpoint: str | Path | Gemma | Subject,
    prompt: str | Asked | Tensors,
    *,
    matmul: str | None = None,
    more_tokens: int = 0,
    progress: Progress | None = None,
    bos: bool = True,
    chat: bool = False,
    system: str | None = None,
    special_tokens: bool = False,
    **how: Unpack[ModelOptions],
) -> Source:
    """The kit's own model of a checkpoint, transformers' where its name begins with hf:, or one that is open already.

    Weights are streamed where `stream` says so, or where a run of `more_tokens` beyond the prompt would not fit.
    """
    if isinstance(prompt, Tensors):
        if chat or system is not None:
            raise MisuseError(
                f"{prompt.name} holds tensors, and a chat is made of text; leave out --chat and --system."
            )
        return _of_tensors(checkpoint, prompt, matmul=matmul, progress=progress, **how)
    if not prompt:
        raise MisuseError("The prompt is empty; write at least one character.")
    asked = Asked(text=prompt) if isinstance(prompt, str) else prompt
    if system is not None and not (chat or asked.chat):
        raise MisuseError("A system text is part of the turn template; add --chat (in Python, chat=True).")
    if chat and not asked.chat:
        asked = replace(asked, chat=True)
    if system is not None:
        asked = replace(asked, system=system)
    text = _Prompt(asked=asked, bos=bos, special_tokens=special_tokens)
    if not isinstance(checkpoint, str | Path):
        if how:
            raise MisuseError(f"A model that is open keeps the {', '.join(how)} it was opened with; leave them out.")
        return _opened(GemmaSubject(checkpoint) if isinstance(checkpoint, Gemma) else checkpoint, text)
    parse_device(how.get("device", "cpu"))
    return _from_name(checkpoint, text, matmul, more_tokens, progress, **how)


def _of_tensors(checkpoint: str | Path | Gemma | Subject, prompt: Tensors, **how: Any) -> Source:
    """The model for one forward pass on tensors by name; a row of tokens alone is run as a prompt is."""
    row = row_of(prompt.given)
    theirs = isinstance(checkpoint, str | Path) and str(checkpoint).startswith(PREFIX)
    theirs = theirs or isinstance(checkpoint, hf.HuggingFaceModel)
    if row is None and not theirs:
        raise MisuseError(
            f"{prompt.name} holds {', '.join(prompt.given)}; the kit's own model reads one row of input_ids [1, T]. "
            "For all that transformers' model takes put hf: before a Hugging Face folder."
        )
    if row is None and isinstance(checkpoint, str | Path):
        return _whole(str(checkpoint).removeprefix(PREFIX), prompt, **how)
    opened = open_source(checkpoint, _ANY, **how)
    return replace(opened, tokens=row or [], given=None if row else prompt.given)


def _whole(
    name: str, prompt: Tensors, *, matmul: str | None, progress: Progress | None, **options: Unpack[ModelOptions]
) -> Source:
    """A model of transformers' as its config names it, which need not read text."""
    if options.get("rescale", 1.0) != 1.0:
        raise MisuseError("A model that is run on tensors runs as it is; leave out --stress.")
    how: dict[str, Any] = {key: options.get(key) for key in ("attention", "adapter")}
    how |= {"trust_remote_code": options.get("trust_remote_code", False), "stream": options.get("stream") or None}

    def unread(asked: Asked) -> list[int]:
        raise MisuseError(f"{name} is run on tensors here, and reads no text.")

    device = options.get("device", "cpu")
    return Source(
        tokens=[],
        read=unread,
        piece=lambda token: f"<row {token}>",
        subject_in=lambda dtype, announce: hf.open_model(
            name, dtype=dtype, device=device, whole=True, progress=announce, **how
        ),
        tensors=hf.stored_tensors(name),
        bytes=hf.stored_bytes(name),
        given=prompt.given,
    )


def _from_name(
    checkpoint: str | Path,
    prompt: _Prompt,
    matmul: str | None,
    more_tokens: int,
    progress: Progress | None,
    *,
    device: str = "cpu",
    rounding: RoundingName = "transformers",
    rescale: float = 1.0,
    attention: Attention | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
) -> Source:
    check_options(checkpoint, rounding, rescale, attention, adapter, trust_remote_code)
    name = str(checkpoint)
    if name.startswith(PREFIX):
        how = {
            "attention": attention,
            "adapter": adapter,
            "trust_remote_code": trust_remote_code,
            "stream": stream or None,
        }
        return _of_folder(name.removeprefix(PREFIX), prompt, device, rescale, progress, how)
    opened = checkpoint_of(checkpoint, progress)
    config, own = opened.config, Tokenizer(opened.vocabulary)
    read = prompt.reader(own.encode, partial(own.chat, generation=config.generation))
    tokens = read(prompt.asked)
    scaling = stress_of_gemma(config, rescale)

    def subject_in(dtype: str, announce: Callable[[int, int], None]) -> Subject:
        products = matmul or preferred_matmul(dtype, device)
        model = build(
            opened,
            dtype=dtype,
            device=device,
            rounding=rounding,
            scaling=scaling,
            stream=stream or None,
            beside=beside_weights(config, dtype, len(tokens) + more_tokens, matmul=products, device=device),
            progress=announce,
        )
        model.tokenizer = own  # the same as it would make in half a second
        return GemmaSubject(model)

    def weight(name: str, tensor: Tensor) -> Tensor:
        factor = scaling.parameters.get(name)
        return tensor if factor is None or factor.added else scaled(tensor, factor)  # gains are scaled in their norms

    return Source(
        tokens=tokens,
        read=read,
        piece=own.piece,
        subject_in=subject_in,
        tensors=((name, weight(name, tensor)) for name, tensor in opened.tensors.items()),
        bytes=sum(tensor.nbytes for tensor in opened.tensors.values()),
        blocks=opened.blocks,
    )


def _of_folder(
    name: str, prompt: _Prompt, device: str, rescale: float, progress: Progress | None, how: dict[str, Any]
) -> Source:
    tokenizer = hf.open_tokenizer(name, trust_remote_code=how["trust_remote_code"])
    read = prompt.reader(tokenizer.encode, tokenizer.chat)
    if rescale == 1:
        return Source(
            tokens=read(prompt.asked),
            read=read,
            piece=tokenizer.piece,
            subject_in=lambda dtype, announce: hf.open_model(
                name, dtype=dtype, device=device, progress=announce, **how
            ),
            tensors=hf.stored_tensors(name),
            bytes=hf.stored_bytes(name),
        )
    folder = StressedFolder.of(name, rescale, progress=stage("reading weights", progress), **how)
    return Source(
        tokens=read(prompt.asked),
        read=read,
        piece=tokenizer.piece,
        subject_in=lambda dtype, announce: folder.open(dtype, device=device, progress=announce),
        tensors=folder.tensors(),
        bytes=folder.bytes,
    )


def _opened(subject: Subject, prompt: _Prompt) -> Source:
    """Of a model that is open: it runs in its own dtype."""
    if isinstance(subject, GemmaSubject):
        tokenizer = subject.module.tokenizer
        if tokenizer is None:
            raise MisuseError("A prompt is read by the model's tokenizer, and this model was built without one.")
        read = prompt.reader(tokenizer.encode, partial(tokenizer.chat, generation=subject.module.config.generation))
    elif isinstance(subject, hf.HuggingFaceModel) and subject.tokenizer is not None:
        read = prompt.reader(subject.tokenizer.encode, subject.tokenizer.chat)
    else:
        raise MisuseError(f"Expected a checkpoint's name or a model from open_model(), got {type(subject).__name__}.")
    weights = dict(subject.module.named_parameters())
    own = str(next(one.dtype for one in weights.values() if one.is_floating_point())).removeprefix("torch.")
    weights |= {name: buffer for name, buffer in subject.module.named_buffers() if role_of(name)}

    def subject_in(dtype: str, announce: Callable[[int, int], None]) -> Subject:
        if dtype != own:
            raise MisuseError(f"The open model runs in {own}, not {dtype}; pass its checkpoint's name for others.")
        return subject

    return Source(
        tokens=read(prompt.asked),
        read=read,
        piece=subject.piece,
        subject_in=subject_in,
        tensors=weights.items(),
        bytes=sum(one.nbytes for one in weights.values()),
        dtypes=(own,),
    )


def counting(progress: Progress | None, total: int) -> Callable[[int], None]:
    """To be called with the bytes of weights that were checked since the last call."""
    done, announce = 0, stage("checking weights", progress)

    def count(more: int) -> None:
        nonlocal done
        done += more
        announce(done, total)

    return count
