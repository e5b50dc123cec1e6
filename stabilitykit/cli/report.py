"""`stabilitykit report`: the page, the tables and the figures of a sweep, from its records alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stabilitykit.checkpoints import Checkpoint
    from stabilitykit.records.sweep import Results


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a sweep, such as reports/float16_break.")],
    against: Annotated[
        Path | None, typer.Option(help="The folder of another sweep: say what changed from it to this one.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Number format to judge values by, such as bfloat16; the experiment's if not given.",
        ),
    ] = None,
) -> None:
    """Write FOLDER's report.html, report.md, figures and tables anew, and print the verdict."""
    write(folder, against=against, form=form, quiet=False)


def check_report(folder: Path | None, checkpoint: "Checkpoint") -> None:
    """Raises MisuseError where `folder` holds a report on another checkpoint, before anything long has run."""
    from stabilitykit.records.sweep import Results

    if folder is not None and (folder / "experiment.json").exists():
        Results.open(folder).check_checkpoint(checkpoint.source, checkpoint.sha256)


def findings(folder: Path, checkpoint: "Checkpoint", *, title: str, section: str, command: str) -> "Results":
    """The sweep's folder, or a new one that holds no cases and whose report has that section alone."""
    from stabilitykit.records.sweep import Results
    from stabilitykit.sweeps.plan import plan_without_cases

    if (folder / "experiment.json").exists():
        return Results.open(folder)
    plan = plan_without_cases(checkpoint, name=folder.name, title=title, command=command, sections=[section])
    return Results.create(folder, plan)


def write(folder: Path, *, against: Path | None, quiet: bool, form: str | None = None) -> None:
    """Draws the report of the sweep in `folder`; unless `quiet`, prints the verdict and where the page is."""
    import gc
    from dataclasses import replace

    from stabilitykit.cli import screen
    from stabilitykit.formats import number_format
    from stabilitykit.records.sweep import Results
    from stabilitykit.report.compare import compare
    from stabilitykit.report.sections import section, shown
    from stabilitykit.report.terminal import print_section
    from stabilitykit.report.write import write_report

    results = Results.open(folder)
    if form is not None:
        results.plan = replace(results.plan, format=number_format(form).name)
    names = shown(results)
    with screen.progress_bar() as progress:
        sections = []
        for done, name in enumerate(names):
            progress("reading records", done, len(names))
            sections.append(section(results, name))
        if against is not None:
            sections.insert(1, compare(results, Results.open(against)))
        gc.freeze()  # the records, which are many and stay: looking for some to free takes as long as reading them
        page = write_report(results.plan.title, sections, folder, progress=progress)
    if quiet:
        return
    for shown_first in sections[: 1 if against is None else 2]:
        print_section(shown_first, screen.output)
    screen.print_note(f"Report: {page}")
