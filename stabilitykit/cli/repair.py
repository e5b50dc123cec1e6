"""`stabilitykit repair`: rank what keeps a checkpoint finite in float16, and write one that is."""

import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stabilitykit.checkpoints import Checkpoint
    from stabilitykit.results import Results


class StoredDtype(StrEnum):
    float16 = "float16"
    float32 = "float32"


def repair(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="gemma3-270m (extra: demo), a Hugging Face folder, a .gguf or .ckpt file, random:SIZE, or hf:NAME of "
            "what lies in the local Hugging Face cache."
        ),
    ],
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
    margin: Annotated[
        float, typer.Option(min=0.0, help="Bits of headroom to leave above the largest value seen.")
    ] = 1.0,
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
    from stabilitykit.cli.source import local_name
    from stabilitykit.gemma.load import parse_device
    from stabilitykit.gemma.tokenizer import Tokenizer
    from stabilitykit.remedies.export import check_new, export
    from stabilitykit.remedies.repair import repair as find
    from stabilitykit.remedies.rescale import refuse_folder
    from stabilitykit.remedies.texts import texts
    from stabilitykit.results import Results

    name = local_name(checkpoint)
    place = str(parse_device(device))
    if out is not None:
        check_new(out)
    refuse_folder(Path(name))
    with screen.progress_bar() as progress:
        opened = open_checkpoint(name, progress=lambda done, total: progress("reading weights", done, total))
        if report is not None and (report / "experiment.json").exists():
            Results.open(report).check_checkpoint(opened.source, opened.sha256)  # before anything long has run
        chosen = texts(opened.config, Tokenizer(opened.vocabulary), prompts or ())
        command = _command(checkpoint, prompts or (), margin, report)
        found = find(opened, chosen, margin=margin, device=place, command=command, progress=progress)
        ranking = found.ranking
        is_finite = ranking.repaired.finite
        if report is not None:
            _results(report, opened, command, place).write_ranking(ranking)
        if out is not None and is_finite:
            export(opened, found, out, dtype.value, progress=lambda done, total: progress("writing", done, total))
    if report is not None:
        from stabilitykit.cli.report import write

        write(report, against=None, quiet=True)
    if as_json:
        written = str(out) if out is not None and is_finite else None
        screen.print_json({**ranking.document(), "out": written, "report": None if report is None else str(report)})
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


def _results(folder: Path, opened: "Checkpoint", command: str, device: str) -> "Results":
    """The sweep's folder, or a new one that holds no cases."""
    from stabilitykit.experiment.plan import plan_without_cases
    from stabilitykit.results import Results

    if (folder / "experiment.json").exists():
        return Results.open(folder)
    title = f"What keeps {Path(opened.source).name} finite in float16"
    plan = plan_without_cases(
        opened, name=folder.name, title=title, command=command, sections=["remedies"], device=device
    )
    return Results.create(folder, plan)


def _command(checkpoint: str, prompts: Sequence[Path], margin: float, report: Path | None) -> str:
    words = ["stabilitykit", "repair", checkpoint]
    words += [word for prompt in prompts for word in ("--prompts", str(prompt))]
    words += ["--margin", f"{margin:g}"] if margin != 1 else []
    words += ["--report", str(report)] if report is not None else []
    return shlex.join(words)
