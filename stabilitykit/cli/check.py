"""`stabilitykit check`: exit with 0 where a model keeps its limits in a dtype, and with 1 where it does not."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import stabilitykit.cli.options as options
from stabilitykit.errors import MisuseError, StabilityKitError

if TYPE_CHECKING:
    from stabilitykit.records.gate import Gate


def check(
    checkpoint: options.Checkpoint,
    dtype: Annotated[str, typer.Option(help="Dtype to check: float16, bfloat16, float32 or float64.")] = "float16",
    min_headroom: Annotated[
        float | None,
        typer.Option(help="Bits that every tensor must keep below the dtype's maximum.", show_default=False),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Largest mean KL divergence from float32, in nats a token, of a prompt.", show_default=False),
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of text (.txt, .md), chats (.json, .jsonl) or tensors (.npz, .safetensors, .pt), or a folder of "
            "them; repeatable. Texts of the kit's own if not given.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="File of an earlier --write-baseline to compare with.", show_default=False)
    ] = None,
    write_baseline: Annotated[
        Path | None, typer.Option(help="File to keep the headroom of every site in.", show_default=False)
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Bits that a site may lose against the baseline.")] = 0.5,
    junit: Annotated[Path | None, typer.Option(help="File for a JUnit report (XML).", show_default=False)] = None,
    sarif: Annotated[Path | None, typer.Option(help="File for a SARIF 2.1.0 log (JSON).", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Check the stored weights and run nothing.")
    ] = False,
    no_bos: options.NoBos = False,
    chat: options.Chat = False,
    redact: options.Redact = False,
    device: options.Device = "cpu",
    rescale: options.Rescale = 1.0,
    attention: options.AttentionName = None,
    adapter: options.Adapter = None,
    trust_remote_code: options.TrustRemoteCode = False,
    stream: options.Stream = False,
    as_json: options.Json = False,
) -> None:
    """Check that a model keeps its limits in a dtype: its weights first, then prompts, every length at once.

    Without limits nothing may leave the range. Exits 0 when everything holds, 1 when something does not, and 2 for
    misuse and for what cannot be judged.
    """
    files = [path for path in (write_baseline, junit, sarif) if path is not None]
    _check_files(files, overwrite=overwrite)
    if weights_only and write_baseline is not None:
        raise MisuseError("A baseline keeps what prompts show, and --weights-only runs none; leave out one of the two.")
    from stabilitykit.cli import screen
    from stabilitykit.gate.check import check as run
    from stabilitykit.records.document import to_document

    try:
        with screen.progress_bar() as progress:
            found = run(
                checkpoint,
                dtype=dtype,
                min_headroom=min_headroom,
                max_kl=max_kl,
                prompts=prompts or (),
                baseline=baseline,
                tolerance=tolerance,
                weights_only=weights_only,
                redact=redact,
                command=options.command_line(),
                progress=progress,
                bos=not no_bos,
                chat=chat,
                device=device,
                rescale=rescale,
                attention=attention,
                adapter=adapter,
                trust_remote_code=trust_remote_code,
                stream=stream,
            )
        _write(found, write_baseline, junit, sarif)
    except StabilityKitError as error:
        raise error if isinstance(error, MisuseError) else MisuseError(str(error)) from error
    if as_json:
        screen.print_json(to_document(found))
    else:
        screen.print_gate(found)
        if write_baseline is not None and not found.holds:
            screen.print_note(f"No baseline was written to {write_baseline}: what it keeps has to hold.")
    if not found.holds:
        raise typer.Exit(1)


def _check_files(files: list[Path], *, overwrite: bool) -> None:
    """Raises MisuseError for what could not be written at the end, before anything runs."""
    if len({path.absolute() for path in files}) < len(files):
        raise MisuseError("--write-baseline, --junit and --sarif write a file each; give them different names.")
    for path in files:
        if path.is_dir() or (path.exists() and not overwrite):
            raise MisuseError(f"{path} exists already; choose another name, or add --overwrite to replace a file.")
        if not (place := next(one for one in path.absolute().parents if one.exists())).is_dir():
            raise MisuseError(
                f"{path} cannot be written, because {place} is a file and no folder; choose another name."
            )
        if not os.access(place, os.W_OK):
            raise MisuseError(
                f"{path} cannot be written, because {place} may not be written to; choose another folder."
            )


def _write(found: "Gate", baseline: Path | None, junit: Path | None, sarif: Path | None) -> None:
    """The reports of any check, and the baseline of one that holds."""
    if junit is not None:
        from stabilitykit.gate.junit import write_junit

        write_junit(junit, found)
    if sarif is not None:
        from stabilitykit.gate.sarif import write_sarif

        write_sarif(sarif, found)
    if baseline is not None and found.holds:
        from stabilitykit.gate.baseline import write_baseline

        write_baseline(baseline, found)
