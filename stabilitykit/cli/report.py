"""`stabilitykit report`: the page, the tables and the figures of a sweep, from its records alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stabilitykit.models.machine import Examined
    from stabilitykit.records.sweep import Finding


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a sweep, such as reports/float16_break.", show_default=False)
    ],
    against: Annotated[
        Path | None, typer.Option(help="Folder of an earlier sweep: also report what changed since.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Number format to judge values by, such as bfloat16; the experiment's if not given.",
            show_default=False,
        ),
    ] = None,
    pdf: Annotated[
        bool, typer.Option("--pdf", help="Also print the page to report.pdf, by Chromium, Chrome or Edge.")
    ] = False,
) -> None:
    """Write FOLDER's report.html, report.md, figures and tables anew, and print the verdict."""
    write(folder, against=against, form=form, pdf=pdf, quiet=False)


def check_report(folder: Path | None, checkpoint: "Examined") -> None:
    """Raises MisuseError where `folder` holds a report on another checkpoint, before anything long has run."""
    from stabilitykit.records.sweep import Results

    if folder is not None and (folder / "experiment.json").exists():
        Results.open(folder).check_checkpoint(checkpoint.source, checkpoint.sha256)


def conclude(
    checkpoint: "Examined",
    found: "Finding",
    *,
    report: Path | None,
    title: str,
    section: str,
    as_json: bool,
    show: Callable[[], None],
    config: Mapping[str, Any],
    out: tuple[str, Path | None] | None = None,
) -> None:
    """The end of a command with a finding: adds it to a report, prints it, and says where it was written.

    `config` are the model's settings, for a new report. `show` prints the finding for people. `out` is what else the
    command writes, by its name, and where it did so.
    """
    from stabilitykit.cli import screen
    from stabilitykit.cli.source import print_checkpoint
    from stabilitykit.records.document import to_document

    if report is not None:
        add_finding(report, checkpoint, config, found, title=title, section=section)
    if as_json:
        paths = {} if out is None else {"out": out[1], "report": report}
        told = {name: None if path is None else str(path) for name, path in paths.items()}
        screen.print_json({**to_document(found), **told})
        return
    print_checkpoint(checkpoint.source, checkpoint.notes)
    show()
    for what, path in (*([] if out is None else [out]), ("Report", report and report / "report.html")):
        if path is not None:
            screen.print_note(f"{what}: {path}")


def add_finding(
    folder: Path, checkpoint: "Examined", config: Mapping[str, Any], found: "Finding", *, title: str, section: str
) -> None:
    """Adds `found` to the sweep in `folder`, or to a new one without cases, and draws the report anew."""
    from stabilitykit.records.sweep import Results
    from stabilitykit.sweeps.plan import plan_without_cases

    if (folder / "experiment.json").exists():
        results = Results.open(folder)
    else:
        command = found.command or ""
        plan = plan_without_cases(
            checkpoint, config, name=folder.name, title=title, command=command, sections=[section]
        )
        results = Results.create(folder, plan)
    results.write_finding(found)
    write(folder, against=None, quiet=True)


def write(folder: Path, *, against: Path | None, quiet: bool, form: str | None = None, pdf: bool = False) -> None:
    """Draws the report of the sweep in `folder`; unless `quiet`, prints the verdict and where the page is."""
    from stabilitykit.cli import screen
    from stabilitykit.report.make import make_report
    from stabilitykit.report.terminal import print_section

    with screen.progress_bar() as progress:
        made = make_report(folder, against=against, form=form, pdf=pdf, progress=progress)
    if quiet:
        return
    for section in made.sections[: 1 if against is None else 2]:
        print_section(section, screen.output)
    screen.print_note(f"Report: {made.page}")
    if made.pdf is not None:
        screen.print_note(f"PDF: {made.pdf}")
