"""`stabilitykit forecast`: what other formats would make of a prompt, from one run that holds all of it."""

import dataclasses
from enum import StrEnum
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
from stabilitykit.formats import number_format

if TYPE_CHECKING:
    from stabilitykit.diagnosis.forecast import Forecast
    from stabilitykit.records import Recording


class WideDtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


def forecast(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)],
    prompt: Annotated[str, typer.Option(help="The text, or @FILE to read it from a UTF-8 file.")],
    format_: Annotated[
        list[str] | None,
        typer.Option("--format", help="A number format; give it again for more. All of 8 and 16 bits if not given."),
    ] = None,
    saturating: Annotated[
        bool,
        typer.Option("--saturating", help="Casts to 8 bits cut off at the format's end instead of making NaN or inf."),
    ] = False,
    dtype: Annotated[WideDtype, typer.Option(help="The run that the forecast is made of.")] = WideDtype.float32,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="Do not begin with <bos>.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in Gemma's turn template, or an hf: tokenizer's own.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    rounding: Annotated[
        RoundingChoice, typer.Option(help="Whose moments of rounding to follow.")
    ] = RoundingChoice.transformers,
    rescale: Annotated[
        float, typer.Option(help="Scale the residual stream by this power of two; float32 output stays the same.")
    ] = 1.0,
    attention: Annotated[
        AttentionChoice | None, typer.Option(help="Of hf: models; transformers' choice if not given.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read each weight when it is needed, as is done where not all of them fit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
    redact: Annotated[
        bool, typer.Option("--redact", help="Keep the prompt and its tokens out of everything written.")
    ] = False,
) -> None:
    """Say for each format which tensor of PROMPT would leave its range first, and what would become of small values.

    The prompt runs once, up to its logits, in a dtype that holds everything. Only tensors that a float16 run would
    store in 16 bits are judged: Gemma computes norms and softmax in float32 in every dtype. Exits 0 whatever was found.
    """
    asked = dict.fromkeys(number_format(name).name for name in format_ or ())
    text = read_prompt(prompt)

    from stabilitykit.cli import screen
    from stabilitykit.diagnosis.forecast import forecast as judge
    from stabilitykit.models.devices import parse_device
    from stabilitykit.models.matmul import preferred_matmul
    from stabilitykit.recorder import DEFAULT_FORMATS
    from stabilitykit.recorder.weights import check_weights
    from stabilitykit.run.case import run_case

    names = list(asked or DEFAULT_FORMATS)
    parse_device(device)
    with screen.progress_bar() as progress:
        source = open_source(
            checkpoint,
            Prompt(text=text, bos=not no_bos, chat=chat, system=None, special_tokens=False),
            device=device,
            rounding=rounding,
            rescale=rescale,
            attention=attention,
            stream=stream,
            progress=progress,
        )
        weights = check_weights(source.tensors, names, counting(progress, source.bytes))
        subject = source.subject_in(dtype.value, lambda done, total: progress("preparing weights", done, total))
        run = run_case(
            subject,
            source.tokens,
            matmul=preferred_matmul(dtype.value, device),
            formats=names,
            redact=redact,
            progress=progress,
        )
    found = [judge(run.recording, name, weights[name], saturating=saturating) for name in names]
    if as_json:
        screen.print_json(_document(run.recording, found))
        return
    print_source(run.recording, source, redact)
    screen.print_forecasts(run.recording, found)


def _document(recording: "Recording", found: "list[Forecast]") -> dict[str, Any]:
    from stabilitykit.diagnosis.forecast import prediction

    header = recording.header
    return {
        "checkpoint": header.checkpoint,
        "dtype": header.dtype,
        "tokens": None if header.tokens is None else list(header.tokens[0]),
        "formats": [
            {
                "format": one.format,
                "breaks": one.breaks,
                "saturating": one.saturating,
                "forecast": prediction(recording, one),
                "first": None if one.first is None else one.first.site,
                "layer": None if one.first is None else one.first.layer,
                "overflow": one.overflow,
                "judged": one.judged,
                "elements": one.elements,
                "past": one.past,
                "subnormal": one.subnormal,
                "zero": one.zero,
                "closest": None if one.closest is None else one.closest.site,
                "amax": None if one.closest is None else one.closest.amax,
                "headroom": one.headroom,
                "weights": None if one.weights is None else dataclasses.asdict(one.weights),
            }
            for one in found
        ],
    }
