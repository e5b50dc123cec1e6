"""`stabilitykit repair`: rank what keeps a checkpoint finite in float16, and write one that is."""

import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stabilitykit.cli.source import LOCAL_CHECKPOINT_HELP, local_checkpoint
from stabilitykit.records.document import to_document


class StoredDtype(StrEnum):
    float16 = "float16"
    float32 = "float32"


def repair(
    checkpoint: Annotated[str, typer.Argument(help=LOCAL_CHECKPOINT_HELP)],
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the repaired checkpoint, which plain transformers loads.")
    ] = None,
    dtype: Annotated[
        StoredDtype, typer.Option(help="In which the weights are written; both run in float16.")
    ] = StoredDtype.float16,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="A UTF-8 file whose text the repair must hold; give it again for more. It ranks nothing."),
    ] = None,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="The --prompts begin without <bos>.")] = False,
    margin: Annotated[
        float, typer.Option(min=0.0, help="Bits of headroom to leave above the largest value seen.")
    ] = 1.0,
    proved: Annotated[
        bool,
        typer.Option("--proved", help="Choose by bounds from the weights, so that no prompt at all can break it."),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="A sweep's folder, whose report gets a section on remedies; or a new one, for that alone."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Rank remedies for float16 on texts that chose nothing, and with --out write the repaired checkpoint.

    The repair scales everything that a norm reads by one power of two: float32 logits keep every bit, and float16 holds
    what it could not. Exits 0 when the repaired checkpoint is finite on all texts, 1 when it is not and nothing was
    written.
    """
    from stabilitykit.checkpoints import open_checkpoint
    from stabilitykit.cli import screen
    from stabilitykit.cli.report import check_report, findings, write
    from stabilitykit.models.devices import parse_device
    from stabilitykit.models.gemma.tokenizer import Tokenizer
    from stabilitykit.remedies.export import check_new, export
    from stabilitykit.remedies.repair import repair as find
    from stabilitykit.remedies.rescale import refuse_folder
    from stabilitykit.remedies.texts import texts

    name = local_checkpoint(checkpoint)
    place = str(parse_device(device))
    if out is not None:
        check_new(out)
    refuse_folder(Path(name))
    with screen.progress_bar() as progress:
        opened = open_checkpoint(name, progress=lambda done, total: progress("reading weights", done, total))
        check_report(report, opened)
        chosen = texts(opened.config, Tokenizer(opened.vocabulary), prompts or (), bos=not no_bos)
        command = _command(checkpoint, prompts or (), no_bos, margin, proved, report)
        found = find(opened, chosen, margin=margin, proved=proved, device=place, command=command, progress=progress)
        ranking = found.ranking
        is_finite = ranking.repaired.finite
        if report is not None:
            title = f"What keeps {Path(opened.source).name} finite in float16"
            findings(report, opened, title=title, section="remedies", command=command).write_finding(ranking)
        if out is not None and is_finite:
            export(opened, found, out, dtype.value, progress=lambda done, total: progress("writing", done, total))
    if report is not None:
        write(report, against=None, quiet=True)
    if as_json:
        written = str(out) if out is not None and is_finite else None
        screen.print_json({**to_document(ranking), "out": written, "report": None if report is None else str(report)})
    else:
        for note in (opened.source, *(f"{note}." for note in opened.notes)):
            screen.print_note(note)
        screen.output.print()
        screen.print_ranking(ranking)
        if out is not None and is_finite:
            screen.print_note(f"Repaired checkpoint: {out}")
        if report is not None:
            screen.print_note(f"Report: {report / 'report.html'}")
    if not is_finite:
        raise typer.Exit(1)


def _command(
    checkpoint: str, prompts: Sequence[Path], no_bos: bool, margin: float, proved: bool, report: Path | None
) -> str:
    words = ["stabilitykit", "repair", checkpoint]
    words += [word for prompt in prompts for word in ("--prompts", str(prompt))]
    words += ["--no-bos"] if no_bos else []
    words += ["--margin", f"{margin:g}"] if margin != 1 else []
    words += ["--proved"] if proved else []
    words += ["--report", str(report)] if report is not None else []
    return shlex.join(words)
