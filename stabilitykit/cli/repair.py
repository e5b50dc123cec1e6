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
    from stabilitykit.cli.report import add_finding, check_report
    from stabilitykit.cli.source import print_checkpoint
    from stabilitykit.models.devices import parse_device
    from stabilitykit.records.document import to_document
    from stabilitykit.remedies.export import check_new
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
    if report is not None:
        title = f"What keeps {Path(opened.source).name} finite in float16"
        add_finding(report, opened, found.ranking, title=title, section="remedies")
    written = out if found.finite else None
    if as_json:
        paths = {"out": None if written is None else str(written), "report": None if report is None else str(report)}
        screen.print_json({**to_document(found.ranking), **paths})
    else:
        print_checkpoint(opened.source, opened.notes)
        screen.print_ranking(found.ranking)
        if written is not None:
            screen.print_note(f"Repaired checkpoint: {written}")
        if report is not None:
            screen.print_note(f"Report: {report / 'report.html'}")
    if not found.finite:
        raise typer.Exit(1)
