"""`stabilitykit repair`: rank what keeps a checkpoint finite in float16, and write one that is."""

from pathlib import Path
from typing import Annotated

import typer

import stabilitykit.cli.options as options
from stabilitykit.choices import ExportDtype


def repair(
    checkpoint: options.LocalCheckpoint,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the repaired checkpoint, which plain transformers loads.")
    ] = None,
    dtype: Annotated[
        ExportDtype, typer.Option(help="Dtype in which the weights are written; either runs in float16.")
    ] = "float16",
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text file on which the repaired model must stay finite; repeatable. Not used for ranking.",
            show_default=False,
        ),
    ] = None,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="Start the --prompts without <bos>.")] = False,
    margin: Annotated[
        float, typer.Option(min=0.0, help="Bits of headroom to leave above the largest magnitude seen.")
    ] = 1.0,
    proved: Annotated[
        bool,
        typer.Option("--proved", help="Choose by bounds from the weights, so that no prompt of any length overflows."),
    ] = False,
    report: options.Report = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Rank remedies for float16 on held-out texts, and with --out write the repaired checkpoint.

    The repair scales everything that a norm reads by one power of two: float32 logits keep every bit, and float16 holds
    what it could not. Exits 0 when the repaired checkpoint is finite on all texts, 1 when it is not and nothing was
    written.
    """
    from stabilitykit.cli import screen
    from stabilitykit.cli.report import check_report, conclude
    from stabilitykit.files import check_new
    from stabilitykit.models.devices import parse_device
    from stabilitykit.remedies.repair import checkpoint_to_repair
    from stabilitykit.remedies.repair import repair as run

    parse_device(device)
    if out is not None:
        check_new(out)
    with screen.progress_bar() as progress:
        opened = checkpoint_to_repair(checkpoint, progress)
        check_report(report, opened)
        found = run(
            opened,
            prompts=prompts or (),
            bos=not no_bos,
            margin=margin,
            proved=proved,
            out=out,
            dtype=dtype,
            device=device,
            command=options.command_line(),
            progress=progress,
        )
    conclude(
        opened,
        found.ranking,
        report=report,
        title=f"What keeps {Path(opened.source).name} finite in float16",
        section="remedies",
        as_json=as_json,
        show=lambda: screen.print_ranking(found.ranking),
        out=("Repaired checkpoint", out if found.finite else None),
    )
    if not found.finite:
        raise typer.Exit(1)
