"""What the commands run: a prompt and a checkpoint, whoever runs it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from stabilitykit.errors import MisuseError

if TYPE_CHECKING:
    from torch import Tensor

    from stabilitykit.models.subject import Subject
    from stabilitykit.records import Recording
    from stabilitykit.run.case import Progress

HF = "hf:"
LOCAL_CHECKPOINT_HELP = (
    "gemma3-270m (extra: demo), a Hugging Face folder, a .gguf or .ckpt file, random:SIZE, or hf:NAME of what lies in "
    "the local Hugging Face cache."
)
CHECKPOINT_HELP = (
    "gemma3-270m (extra: demo), a Hugging Face folder, a .gguf or gemma_pytorch's .ckpt file, "
    "random:SIZE?layers=2&seed=0, or hf:FOLDER or hf:NAME to run transformers' own code (extra: hf)."
)


class RoundingChoice(StrEnum):
    transformers = "transformers"
    gemma_pytorch = "gemma_pytorch"


class AttentionChoice(StrEnum):
    eager = "eager"
    sdpa = "sdpa"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    text: str
    bos: bool
    chat: bool
    system: str | None
    special_tokens: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the command needs of a checkpoint, whoever runs it; `tensors` are the weights as stored."""

    tokens: list[int]
    piece: Callable[[int], str]
    subject_in: "Callable[[str, Callable[[int, int], None]], Subject]"
    tensors: "Iterable[tuple[str, Tensor]]"
    bytes: int


def local_checkpoint(checkpoint: str) -> str:
    """What the kit's own model reads; of transformers' the folder, for it computes the same to the bit."""
    from stabilitykit.checkpoints.hub import local_folder

    return str(local_folder(checkpoint.removeprefix(HF))) if checkpoint.startswith(HF) else checkpoint


def open_source(
    checkpoint: str,
    prompt: Prompt,
    *,
    device: str,
    rounding: RoundingChoice = RoundingChoice.transformers,
    rescale: float = 1.0,
    attention: AttentionChoice | None = None,
    adapter: Path | None = None,
    stream: bool = False,
    matmul: str | None = None,
    more_tokens: int = 0,
    progress: "Progress",
) -> Source:
    """The kit's own model of a checkpoint, or transformers' where its name begins with hf:.

    Weights are streamed with `stream`, or where a prompt of so many tokens more would not fit. Raises MisuseError for
    options that belong to the other one.
    """
    if checkpoint.startswith(HF):
        if rounding is not RoundingChoice.transformers or rescale != 1:
            raise MisuseError("--rounding and --rescale are the kit's own model's; leave them out with hf:.")
        return _huggingface(checkpoint.removeprefix(HF), prompt, device, attention, adapter, stream or None)
    if attention is not None or adapter is not None:
        raise MisuseError(
            "--attention and --adapter are for transformers' models: write hf: before the folder or the name."
        )

    return _gemma(checkpoint, prompt, device, rounding, rescale, stream or None, more_tokens, matmul, progress)


def _gemma(
    name: str,
    prompt: Prompt,
    device: str,
    rounding: RoundingChoice,
    rescale: float,
    stream: bool | None,
    more_tokens: int,
    matmul: str | None,
    progress: "Progress",
) -> Source:
    """The kit's own model of a checkpoint."""
    from stabilitykit.checkpoints import open_checkpoint
    from stabilitykit.models.gemma import build
    from stabilitykit.models.gemma.footprint import footprint
    from stabilitykit.models.gemma.rescale import weight_factor
    from stabilitykit.models.gemma.subject import GemmaSubject
    from stabilitykit.models.gemma.tokenizer import Tokenizer
    from stabilitykit.models.matmul import preferred_matmul

    opened = open_checkpoint(name, progress=lambda done, total: progress("reading weights", done, total))
    tokenizer = Tokenizer(opened.vocabulary)
    if prompt.chat:
        tokens = tokenizer.chat(
            prompt.text,
            generation=opened.config.generation,
            system=prompt.system,
            bos=prompt.bos,
            special_tokens=prompt.special_tokens,
        )
    else:
        tokens = tokenizer.encode(prompt.text, bos=prompt.bos, special_tokens=prompt.special_tokens)

    def subject_in(dtype: str, announce: Callable[[int, int], None]) -> "Subject":
        products = matmul or preferred_matmul(dtype, device)
        needs = footprint(opened.config, dtype, len(tokens) + more_tokens, matmul=products, device=device)
        made = build(
            opened,
            dtype=dtype,
            device=device,
            rounding=rounding.value,
            rescale=rescale,
            stream=stream,
            beside=needs.cache + needs.activations,
            progress=announce,
        )
        return GemmaSubject(made)

    def scaled(name: str, tensor: "Tensor") -> "Tensor":
        factor = weight_factor(opened.config, name, rescale)
        return tensor if factor == 1 else tensor * factor

    return Source(
        tokens=tokens,
        piece=tokenizer.piece,
        subject_in=subject_in,
        tensors=((name, scaled(name, tensor)) for name, tensor in opened.tensors.items()),
        bytes=sum(tensor.nbytes for tensor in opened.tensors.values()),
    )


def _huggingface(
    name: str,
    prompt: Prompt,
    device: str,
    attention: AttentionChoice | None,
    adapter: Path | None,
    stream: bool | None,
) -> Source:
    """transformers' model of a folder."""
    from stabilitykit.models import transformers as hf

    tokenizer = hf.open_tokenizer(name)
    if prompt.chat:
        tokens = tokenizer.chat(prompt.text, system=prompt.system, bos=prompt.bos, special_tokens=prompt.special_tokens)
    else:
        tokens = tokenizer.encode(prompt.text, bos=prompt.bos, special_tokens=prompt.special_tokens)

    def subject_in(dtype: str, announce: Callable[[int, int], None]) -> "Subject":
        return hf.open_model(
            name,
            dtype=dtype,
            device=device,
            attention=None if attention is None else attention.value,
            adapter=adapter,
            stream=stream,
            progress=announce,
        )

    return Source(
        tokens=tokens,
        piece=tokenizer.piece,
        subject_in=subject_in,
        tensors=hf.stored_tensors(name),
        bytes=hf.stored_bytes(name),
    )


def counting(progress: "Progress", total: int) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress("checking weights", done, total)

    return count


def read_prompt(prompt: str) -> str:
    from stabilitykit.run.prompts import read_text

    text = read_text(Path(prompt[1:])) if prompt.startswith("@") else prompt
    if not text:
        raise MisuseError("A prompt has at least one character; this one is empty. Write some text.")
    return text


def print_source(recording: "Recording", source: Source, redact: bool) -> None:
    from stabilitykit.cli import screen
    from stabilitykit.words import count, quoted

    header = recording.header
    screen.print_note(str(header.checkpoint))
    for note in header.notes:
        screen.print_note(f"{note}.")
    tokens: Sequence[int] = source.tokens
    amount = count(len(tokens), "token")
    if redact:
        screen.print_note(f"{amount}, redacted.")
    else:
        shown = " ".join(quoted(source.piece(token)) for token in tokens[:16])
        screen.print_note(f"{amount}: {shown}{' ...' if len(tokens) > 16 else ''}")
    screen.output.print()
