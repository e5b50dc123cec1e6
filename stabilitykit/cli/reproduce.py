"""`stabilitykit reproduce`: make the failure happen, for real, and show how it came about."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import stabilitykit.cli.options as options
from stabilitykit.errors import MisuseError
from stabilitykit.files import check_new

if TYPE_CHECKING:
    from stabilitykit.records import Recording


def reproduce(
    scenario: Annotated[str, typer.Argument(help="Failure to reproduce; --list shows all.")] = "float16-overflow",
    list_: Annotated[bool, typer.Option("--list", help="List the scenarios.")] = False,
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Checkpoint: gemma3-270m (extra: demo), a .gguf file, random:SIZE?layers=2&seed=0, or, for "
            "float16-overflow, hf:FOLDER or hf:NAME to run transformers' own code (extra: hf)."
        ),
    ] = "gemma3-270m",
    prompt: options.Prompt = "The capital of France is",
    device: options.Device = "cpu",
    rescale: options.Rescale = 1.0,
    export: Annotated[
        Path | None,
        typer.Option(
            help="New folder for a bug report: the operator that broke first, alone, its operands cut to those that "
            "break it, and a script of plain torch that runs it."
        ),
    ] = None,
    redact: Annotated[
        bool,
        typer.Option(
            "--redact", help="Keep the prompt and its tokens out of the output, and all names out of the bug report."
        ),
    ] = False,
    as_json: options.Json = False,
    raise_: Annotated[bool, typer.Option("--raise", help="Raise the error itself, with its traceback.")] = False,
) -> None:
    """Reproduce a failure, and show its error and the chain that led to it.

    Exits 0 when the failure was reproduced, 1 when it was not.
    """
    from stabilitykit.run.scenarios import SCENARIOS, Setup
    from stabilitykit.run.scenarios import scenario as find

    chosen = find(scenario)
    from stabilitykit.cli import screen

    if list_:
        if as_json:
            screen.print_json([{"scenario": known.name, "summary": known.summary} for known in SCENARIOS.values()])
            return
        for known in SCENARIOS.values():
            screen.output.print(f"{known.name:22} {known.summary}")
        return

    from stabilitykit.diagnosis import cause, document
    from stabilitykit.models.devices import parse_device
    from stabilitykit.models.transformers.backend import PREFIX
    from stabilitykit.run.batch import Asked
    from stabilitykit.run.source import checkpoint_of

    parse_device(device)
    asked = options.one_prompt(prompt)
    if export is not None:
        check_new(export)
    with screen.progress_bar() as progress:
        setup = Setup(
            checkpoint=checkpoint,
            prompt=asked.text if isinstance(asked, Asked) and not asked.chat else asked,
            device=device,
            rescale=rescale,
            keep_operands=export is not None,
            redact=redact,
            progress=progress,
        )
        if not checkpoint.startswith(PREFIX):
            setup = replace(setup, checkpoint=checkpoint_of(checkpoint, progress))
        run = chosen.run(setup)
    script, refused = (None, None) if export is None else _exported(run.recording, export, redact=redact)
    if raise_ and run.error is not None:
        raise run.error
    why = cause(run.recording)
    happened = run.error is not None or not run.sampled  # of what draws no token nothing is raised
    reproduced = happened and why is not None and why.name == chosen.expected
    if as_json:
        written = {} if export is None else {"script": None if script is None else str(script)}
        screen.print_json({"scenario": chosen.name, "reproduced": reproduced, **written, **document(run.recording)})
    else:
        _print(chosen.name, chosen.summary, run.error, reproduced)
        screen.print_verdict(run.recording, None)
        screen.print_chain(run.recording)
        if script is not None:
            screen.output.print()
            screen.output.print(
                f"Written: {script}. To run it: {shlex.join(['python', str(script)])}", soft_wrap=True, markup=False
            )
    if refused is not None:
        raise refused
    if not reproduced:
        raise typer.Exit(1)


def _exported(recording: "Recording", folder: Path, *, redact: bool) -> tuple[Path | None, MisuseError | None]:
    """The script that was written, or why there is none, which is said after the verdict."""
    try:
        return recording.export_repro(folder, redact=redact), None
    except MisuseError as refused:
        return None, refused


def _print(name: str, summary: str, error: RuntimeError | None, reproduced: bool) -> None:
    from rich.markup import escape

    from stabilitykit.cli import screen

    screen.output.print(f"[bold]{name}[/bold]: {summary}")
    screen.output.print()
    if error is not None:
        screen.output.print(f"{type(error).__name__}: {escape(str(error))}", style="bold")
    else:
        screen.output.print("Nothing was raised.", style="bold")
    screen.output.print("Reproduced." if reproduced else "Not reproduced: the cause found is not this scenario's.")
    screen.output.print()
