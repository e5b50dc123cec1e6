"""`stabilitykit profile`: run a prompt in each dtype and say where, and why, numbers leave its range."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import stabilitykit.cli.options as options
from stabilitykit.choices import Level
from stabilitykit.commands import again
from stabilitykit.errors import MisuseError

if TYPE_CHECKING:
    from stabilitykit.run.profile import Profile


def profile(
    checkpoint: options.Checkpoint,
    prompt: options.Prompt,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Dtype to run in: float16, bfloat16, float32 or float64; repeatable. float16 if not given.",
            show_default=False,
        ),
    ] = None,
    no_bos: options.NoBos = False,
    chat: options.Chat = False,
    system: Annotated[
        str | None, typer.Option(help="System text for --chat (Gemma 3, and hf: templates with a system role).")
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Read <bos> and the like in the prompt as tokens, not as text.")
    ] = False,
    level: Annotated[
        Level, typer.Option(help="What to record: every operator and module, modules only, or layers only.")
    ] = "operators",
    device: options.Device = "cpu",
    rounding: options.Rounding = "transformers",
    rescale: options.Rescale = 1.0,
    left_padding: Annotated[int, typer.Option(min=0, help="Pad tokens to put before the prompt.")] = 0,
    generate: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens to generate, each a step of its own; ends at the first step that is not finite."
        ),
    ] = 1,
    attention: options.AttentionName = None,
    adapter: options.Adapter = None,
    trust_remote_code: options.TrustRemoteCode = False,
    no_fused_softmax: Annotated[
        bool, typer.Option("--no-fused-softmax", help="Do not recompute the softmax inside fused attention kernels.")
    ] = False,
    matmul: Annotated[
        str | None,
        typer.Option(
            help="How 16-bit products are summed: native, float32-accumulate, or float16-accumulate:K, rounded to "
            "float16 every K terms. If not given, float32-accumulate on a CPU and native elsewhere.",
            show_default=False,
        ),
    ] = None,
    stream: options.Stream = False,
    temperature: Annotated[float, typer.Option(help="Sampling temperature (0 = greedy).")] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling: keep the likeliest tokens up to this total probability.")
    ] = 0.95,
    top_k: Annotated[int, typer.Option(help="Sample from this many of the likeliest tokens.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    as_json: options.Json = False,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the records (Parquet, one file a dtype) and findings (JSON).")
    ] = None,
    redact: options.Redact = False,
) -> None:
    """Run PROMPT in each dtype and say where, and why, numbers leave its range.

    Every tensor of each forward pass and of the sampling after it is recorded. Exits 0 whatever was found:
    `stabilitykit check` is the one to fail a pipeline with.
    """
    if not (0 <= temperature < math.inf):
        raise MisuseError(f"--temperature must be 0 (greedy) or a positive number, got {temperature}.")
    from stabilitykit.cli import screen
    from stabilitykit.files import check_new
    from stabilitykit.models.subject import Sampling
    from stabilitykit.run.profile import profile as run

    if out is not None:
        check_new(out)
    with screen.progress_bar() as progress:
        found = run(
            checkpoint,
            options.one_prompt(prompt),
            dtypes=dtype,
            new_tokens=generate,
            left_padding=left_padding,
            sampling=Sampling(temperature=temperature or None, top_p=top_p, top_k=top_k, seed=seed),
            level=level,
            fused_softmax=not no_fused_softmax,
            matmul=matmul,
            redact=redact,
            progress=progress,
            bos=not no_bos,
            chat=chat,
            system=system,
            special_tokens=special_tokens,
            device=device,
            rounding=rounding,
            rescale=rescale,
            attention=attention,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
            stream=stream,
        )
    if out is not None:
        found.save(out)
    if as_json:
        documents = found.documents()
        screen.print_json(documents if len(documents) > 1 else documents[0])
        return
    _print(found, redact)
    broken = [recording for recording in found.recordings if screen.is_broken(recording)]
    if broken:
        texts = ["--prompts", prompt[1:]] if prompt.startswith("@") and not redact else []
        command = again("check", checkpoint, "--dtype", broken[0].header.dtype, *texts)
        screen.print_command("profile exits with 0 all the same. To fail a pipeline", command)
    if out is not None:
        screen.print_note(f"Records and findings: {out}")


def _print(found: "Profile", redact: bool) -> None:
    from stabilitykit.cli import screen
    from stabilitykit.cli.source import print_source

    recordings = found.recordings
    print_source(recordings[0], found.pieces, redact)
    screen.print_weights(recordings)
    for recording in recordings:
        screen.print_verdict(recording, found.reference)
    for recording in recordings:
        screen.print_steps(recording)
        screen.print_layers(recording)
        screen.print_precision(recording, found.reference)
        screen.print_chain(recording)
    screen.print_note(screen.LEGEND)
    if any(
        record.softmax is not None and record.softmax.recomputed for recording in recordings for record in recording
    ):
        screen.print_note(
            "The attention kernel keeps no probabilities; entropies were recomputed from its queries and keys."
        )
