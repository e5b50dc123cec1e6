"""`stabilitykit forecast`: what other formats would make of a prompt, from one run that holds all of it."""

from typing import Annotated

import typer

import stabilitykit.cli.options as options
from stabilitykit.choices import WideDtype


def forecast(
    checkpoint: options.Checkpoint,
    prompt: options.Prompt,
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="Number format to forecast; repeatable. All of 8 and 16 bits if not given.",
            show_default=False,
        ),
    ] = None,
    saturating: Annotated[
        bool,
        typer.Option(
            "--saturating", help="Let casts to 8 bits clamp to the format's maximum instead of making NaN or infinity."
        ),
    ] = False,
    dtype: Annotated[
        WideDtype, typer.Option(help="Dtype of the run that the forecast is made from; it must hold every value.")
    ] = "float32",
    no_bos: options.NoBos = False,
    chat: options.Chat = False,
    device: options.Device = "cpu",
    rounding: options.Rounding = "transformers",
    rescale: options.Rescale = 1.0,
    attention: options.AttentionName = None,
    trust_remote_code: options.TrustRemoteCode = False,
    stream: options.Stream = False,
    as_json: options.Json = False,
    redact: options.Redact = False,
) -> None:
    """Say for each format which tensor of PROMPT would overflow first, and what would become of small values.

    The prompt runs once, up to its logits, in a dtype that holds everything. Only tensors that a float16 run would
    store in 16 bits are judged: Gemma computes norms and softmax in float32 in every dtype. Exits 0 whatever was found.
    """
    from stabilitykit.cli import screen
    from stabilitykit.cli.source import print_source
    from stabilitykit.run.forecast import forecast as run

    with screen.progress_bar() as progress:
        found = run(
            checkpoint,
            options.one_prompt(prompt),
            formats=format_ or (),
            saturating=saturating,
            dtype=dtype,
            redact=redact,
            progress=progress,
            bos=not no_bos,
            chat=chat,
            device=device,
            rounding=rounding,
            rescale=rescale,
            attention=attention,
            trust_remote_code=trust_remote_code,
            stream=stream,
        )
    if as_json:
        screen.print_json(found.document())
        return
    print_source(found.recording, found.pieces, redact)
    screen.print_forecasts(found.recording, found.formats)
