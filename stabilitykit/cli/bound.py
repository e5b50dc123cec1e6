"""`stabilitykit bound`: what no prompt can make a tensor exceed, from the weights alone."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stabilitykit.cli.source import LOCAL_CHECKPOINT_HELP, local_checkpoint
from stabilitykit.records.document import to_document


class BoundDtype(StrEnum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def bound(
    checkpoint: Annotated[str, typer.Argument(help=LOCAL_CHECKPOINT_HELP)],
    dtype: Annotated[BoundDtype, typer.Option(help="The dtype in which results are stored.")] = BoundDtype.float16,
    report: Annotated[
        Path | None,
        typer.Option(help="A sweep's folder, whose report gets a section on bounds; or a new one, for that alone."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Bound every tensor of the checkpoint for every prompt of any length, from its weights alone, rounding included.

    Beside the bound stand the largest value in three texts and the largest that a search over hidden states found: how
    far the bound may be from the truth. Exits 0 whatever was found.
    """
    from stabilitykit.bounds import examine
    from stabilitykit.checkpoints import open_checkpoint
    from stabilitykit.cli import screen
    from stabilitykit.cli.report import check_report, findings, write
    from stabilitykit.models.gemma.tokenizer import Tokenizer
    from stabilitykit.models.machine import machine, versions
    from stabilitykit.records.bounds import Bounds
    from stabilitykit.remedies.rescale import refuse_folder
    from stabilitykit.remedies.texts import texts

    name = local_checkpoint(checkpoint)
    refuse_folder(Path(name))
    command = ["stabilitykit", "bound", checkpoint] + (["--dtype", dtype.value] if dtype != BoundDtype.float16 else [])
    command += ["--report", str(report)] if report is not None else []
    with screen.progress_bar() as progress:
        opened = open_checkpoint(name, progress=lambda done, total: progress("reading weights", done, total))
        check_report(report, opened)
        prompts = texts(opened.config, Tokenizer(opened.vocabulary)).choosing
        found = Bounds(
            checkpoint=opened.source,
            sha256=opened.sha256,
            notes=opened.notes,
            command=shlex.join(command),
            dtype=dtype.value,
            sites=tuple(examine(opened, prompts, dtype.value, progress=progress)),
            versions=versions(),
            machine=machine("cpu"),
        )
    if report is not None:
        title = f"What no prompt can make {Path(opened.source).name} exceed in {dtype.value}"
        findings(report, opened, title=title, section="bounds", command=found.command).write_finding(found)
        write(report, against=None, quiet=True)
    if as_json:
        screen.print_json(to_document(found))
        return
    for note in (opened.source, *(f"{note}." for note in opened.notes)):
        screen.print_note(note)
    screen.output.print()
    screen.print_bounds(found.sites)
    if report is not None:
        screen.print_note(f"Report: {report / 'report.html'}")
