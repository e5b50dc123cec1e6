"""`stabilitykit profile`: run a prompt in each dtype and say where, and why, numbers leave its range."""

import json
import math
import shutil
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabilitykit.errors import MisuseError

if TYPE_CHECKING:
    from stabilitykit.gemma.tokenizer import Tokenizer
    from stabilitykit.records import Recording


class LevelName(StrEnum):
    layers = "layers"
    modules = "modules"
    operators = "operators"


class RoundingChoice(StrEnum):
    transformers = "transformers"
    gemma_pytorch = "gemma_pytorch"


def profile(
    checkpoint: Annotated[
        str, typer.Argument(help="gemma3-270m (extra: demo), a .gguf file, or random:SIZE?layers=2&seed=0.")
    ],
    prompt: Annotated[str, typer.Option(help="The text, or @FILE to read it from a UTF-8 file.")],
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float16, bfloat16, float32 or float64; give it again for more. float16 if not given."),
    ] = None,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="Do not begin with <bos>.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in Gemma's turn template.")] = False,
    system: Annotated[str | None, typer.Option(help="A system text for --chat (Gemma 3).")] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Read <bos> and its like in the prompt as tokens, not text.")
    ] = False,
    level: Annotated[LevelName, typer.Option(help="How much to record.")] = LevelName.operators,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    rounding: Annotated[
        RoundingChoice, typer.Option(help="Whose moments of rounding to follow.")
    ] = RoundingChoice.transformers,
    stress: Annotated[
        float, typer.Option(help="Scale the residual stream by this power of two; float32 output stays the same.")
    ] = 1.0,
    left_padding: Annotated[int, typer.Option(min=0, help="Pad tokens before the prompt.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the sampling step.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of the sampling step.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Of the sampling step.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling step.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the records (Parquet) and findings (JSON).")
    ] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Keep the prompt and its tokens out of everything written.")
    ] = False,
) -> None:
    """Run PROMPT in each dtype and say where, and why, numbers leave its range.

    Every tensor of the forward pass and of one sampling step is recorded. Exits 0 whatever was found.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MisuseError(f"--out names a new or an empty folder, and {out} holds something already; choose another.")
    if not (0 <= temperature < math.inf):
        raise MisuseError(f"A temperature is 0 (greedy) or a positive number; {temperature} is neither.")
    dtypes = dtype or ["float16"]
    text = _read_prompt(prompt)

    from stabilitykit.checkpoints import open_checkpoint
    from stabilitykit.cli import screen
    from stabilitykit.diagnosis import document
    from stabilitykit.experiment.case import Sampling, run_dtypes
    from stabilitykit.gemma.load import parse_device, parse_dtype
    from stabilitykit.gemma.tokenizer import Tokenizer

    for name in dtypes:
        parse_dtype(name)
    parse_device(device)
    with screen.progress_bar() as progress:
        opened = open_checkpoint(checkpoint, progress=lambda done, total: progress("reading weights", done, total))
        tokenizer = Tokenizer(opened.vocabulary)
        if chat:
            tokens = tokenizer.chat(text, system=system, generation=opened.config.generation, bos=not no_bos)
        elif system is not None:
            raise MisuseError("--system belongs to the turn template; add --chat.")
        else:
            tokens = tokenizer.encode(text, bos=not no_bos, special_tokens=special_tokens)
        runs = run_dtypes(
            opened,
            tokens,
            dtypes,
            device=device,
            rounding=rounding.value,
            stress=stress,
            left_padding=left_padding,
            sampling=Sampling(temperature=temperature or None, top_p=top_p, top_k=top_k, seed=seed),
            level=level.value,
            redact=redact,
            token_text=tokenizer.piece,
            progress=progress,
        )
    recordings = [run.recording for run in runs]
    reference = next((recording for recording in recordings if recording.header.dtype == "float32"), None)
    documents = [document(recording, reference) for recording in recordings]
    found: Any = documents[0] if len(documents) == 1 else documents
    if out is not None:
        _write(out, recordings, found)
    if as_json:
        screen.print_json(found)
        return

    _print_subject(recordings[0], tokens, tokenizer, redact)
    for recording in recordings:
        screen.print_verdict(recording, reference)
    for recording in recordings:
        screen.print_layers(recording)
        screen.print_chain(recording)
    screen.print_note(screen.LEGEND)
    if out is not None:
        screen.print_note(f"Records and findings: {out}")


def _read_prompt(prompt: str) -> str:
    from stabilitykit.experiment.prompts import read_text

    text = read_text(Path(prompt[1:])) if prompt.startswith("@") else prompt
    if not text:
        raise MisuseError("A prompt has at least one character; this one is empty. Write some text.")
    return text


def _print_subject(recording: "Recording", tokens: list[int], tokenizer: "Tokenizer", redact: bool) -> None:
    from stabilitykit.cli import screen

    header = recording.header
    screen.print_note(str(header.checkpoint))
    for note in header.notes:
        screen.print_note(f"{note}.")
    if redact:
        screen.print_note(f"{len(tokens)} tokens, redacted.")
    else:
        shown = " ".join(repr(tokenizer.piece(token)) for token in tokens[:16])
        screen.print_note(f"{len(tokens)} tokens: {shown}{' ...' if len(tokens) > 16 else ''}")
    screen.output.print()


def _write(folder: Path, recordings: "list[Recording]", found: Any) -> None:
    """All files beside the folder, then one rename: it is there whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise MisuseError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from None
    try:
        aside.chmod(0o755)
        for recording in recordings:
            recording.save(aside / f"{recording.header.dtype}.parquet")
        (aside / "findings.json").write_text(
            json.dumps(found, ensure_ascii=False, allow_nan=False, indent=2) + "\n", encoding="utf-8"
        )
        aside.rename(folder)
    except OSError as error:
        raise MisuseError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
