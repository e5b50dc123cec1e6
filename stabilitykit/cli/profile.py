"""`stabilitykit profile`: run a prompt in each dtype and say where, and why, numbers leave its range."""

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabilitykit.cli.source import (
    CHECKPOINT_HELP,
    AttentionChoice,
    Prompt,
    RoundingChoice,
    counting,
    open_source,
    print_source,
    read_prompt,
)
from stabilitykit.errors import MisuseError

if TYPE_CHECKING:
    from stabilitykit.records import Recording


class LevelName(StrEnum):
    layers = "layers"
    modules = "modules"
    operators = "operators"


def profile(
    checkpoint: Annotated[
        str,
        typer.Argument(help=CHECKPOINT_HELP),
    ],
    prompt: Annotated[str, typer.Option(help="The text, or @FILE to read it from a UTF-8 file.")],
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float16, bfloat16, float32 or float64; give it again for more. float16 if not given."),
    ] = None,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="Do not begin with <bos>.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in Gemma's turn template, or an hf: tokenizer's own.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="A system text for --chat (Gemma 3, and hf: templates that have the role).")
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Read <bos> and its like in the prompt as tokens, not text.")
    ] = False,
    level: Annotated[LevelName, typer.Option(help="How much to record.")] = LevelName.operators,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    rounding: Annotated[
        RoundingChoice, typer.Option(help="Whose moments of rounding to follow.")
    ] = RoundingChoice.transformers,
    rescale: Annotated[
        float, typer.Option(help="Scale the residual stream by this power of two; float32 output stays the same.")
    ] = 1.0,
    left_padding: Annotated[int, typer.Option(min=0, help="Pad tokens before the prompt.")] = 0,
    generate: Annotated[
        int, typer.Option(min=1, help="New tokens; each is a step of its own, up to the first that breaks.")
    ] = 1,
    attention: Annotated[
        AttentionChoice | None, typer.Option(help="Of hf: models; transformers' choice if not given.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="The folder of a LoRA adapter (peft), for hf: models.")] = None,
    no_fused_softmax: Annotated[
        bool, typer.Option("--no-fused-softmax", help="Do not recompute the softmax inside fused attention.")
    ] = False,
    matmul: Annotated[
        str | None,
        typer.Option(
            help="How 16-bit products are summed: native, float32-accumulate, or float16-accumulate:K, rounded every K "
            "terms. On a CPU float32-accumulate if not given, native elsewhere."
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read each weight when it is needed, as is done where not all of them fit.")
    ] = False,
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

    Every tensor of each forward pass and of the sampling after it is recorded. Exits 0 whatever was found.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MisuseError(f"--out names a new or an empty folder, and {out} holds something already; choose another.")
    if not (0 <= temperature < math.inf):
        raise MisuseError(f"A temperature is 0 (greedy) or a positive number; {temperature} is neither.")
    dtypes = dtype or ["float16"]
    text = read_prompt(prompt)

    from stabilitykit.cli import screen
    from stabilitykit.diagnosis import document
    from stabilitykit.models.devices import parse_device, parse_dtype
    from stabilitykit.models.matmul import check_matmul
    from stabilitykit.models.subject import Sampling
    from stabilitykit.recorder.weights import check_weights
    from stabilitykit.run.case import run_dtypes

    for name in dtypes:
        parse_dtype(name)
    parse_device(device)
    if matmul is not None:
        check_matmul(matmul)
    if system is not None and not chat:
        raise MisuseError("--system belongs to the turn template; add --chat.")
    with screen.progress_bar() as progress:
        source = open_source(
            checkpoint,
            Prompt(text=text, bos=not no_bos, chat=chat, system=system, special_tokens=special_tokens),
            device=device,
            rounding=rounding,
            rescale=rescale,
            attention=attention,
            adapter=adapter,
            stream=stream,
            matmul=matmul,
            more_tokens=left_padding + generate - 1,
            progress=progress,
        )
        weights = check_weights(source.tensors, list(dict.fromkeys(dtypes)), counting(progress, source.bytes))
        runs = run_dtypes(
            source.subject_in,
            source.tokens,
            dtypes,
            new_tokens=generate,
            left_padding=left_padding,
            sampling=Sampling(temperature=temperature or None, top_p=top_p, top_k=top_k, seed=seed),
            level=level.value,
            fused_softmax=not no_fused_softmax,
            matmul=matmul,
            redact=redact,
            weights=weights,
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

    print_source(recordings[0], source, redact)
    screen.print_weights(recordings)
    for recording in recordings:
        screen.print_verdict(recording, reference)
    for recording in recordings:
        screen.print_steps(recording)
        screen.print_layers(recording)
        screen.print_chain(recording)
    screen.print_note(screen.LEGEND)
    if any(
        record.softmax is not None and record.softmax.recomputed for recording in recordings for record in recording
    ):
        screen.print_note(
            "The attention kernel keeps no probabilities; entropies were recomputed from its queries and keys."
        )
    if out is not None:
        screen.print_note(f"Records and findings: {out}")


def _write(folder: Path, recordings: "list[Recording]", found: Any) -> None:
    from stabilitykit.files import new_folder

    with new_folder(folder) as aside:
        for recording in recordings:
            recording.save(aside / f"{recording.header.dtype}.parquet")
        (aside / "findings.json").write_text(
            json.dumps(found, ensure_ascii=False, allow_nan=False, indent=2) + "\n", encoding="utf-8"
        )
