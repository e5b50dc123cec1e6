"""`stabilitykit search`: the shortest prompt that breaks, or the one that comes nearest."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stabilitykit.cli.source import LOCAL_CHECKPOINT_HELP, local_checkpoint
from stabilitykit.errors import MisuseError
from stabilitykit.records.document import to_document

if TYPE_CHECKING:
    from stabilitykit.records.search import Search
    from stabilitykit.searches import Options


class LowDtype(StrEnum):
    float16 = "float16"
    bfloat16 = "bfloat16"


def search(
    checkpoint: Annotated[str, typer.Argument(help=LOCAL_CHECKPOINT_HELP)],
    dtype: Annotated[LowDtype, typer.Option(help="The dtype whose end is looked for.")] = LowDtype.float16,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Only prompts with <bos>, or without; both if not given, unless <bos> alone breaks."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Scan the first LIMIT entries of the vocabulary; all if not given.")
    ] = None,
    beam: Annotated[int, typer.Option(help="Prompts of each length that are kept and drawn out.")] = 8,
    length: Annotated[int, typer.Option(help="The longest prompt to try, in tokens, <bos> not counted.")] = 12,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the prompts, as files 1.txt and so on, and search.json.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="A sweep's folder, whose report gets a section on this; or a new one, for that alone."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Look for the shortest prompt that breaks, or the one that comes nearest, and for the most dangerous tokens.

    Scans the vocabulary: each token alone, after <bos> and inside a text. Then the worst tokens are put together, one
    more at a time, until a prompt breaks. What is said to break was really run. Exits 0 whatever was found.
    """
    from stabilitykit.checkpoints import open_checkpoint
    from stabilitykit.cli import screen
    from stabilitykit.cli.report import check_report, findings, write
    from stabilitykit.models.devices import parse_device
    from stabilitykit.searches import Options
    from stabilitykit.searches import search as find

    options = Options(
        dtype=dtype.value, bos=bos, limit=limit, beam=beam, length=length, device=str(parse_device(device))
    )
    if out is not None:
        _check_new(out)
    command = _command(checkpoint, options, out, report)
    with screen.progress_bar() as progress:
        opened = open_checkpoint(
            local_checkpoint(checkpoint), progress=lambda done, total: progress("reading weights", done, total)
        )
        check_report(report, opened)
        found = find(opened, options, command=command, progress=progress)
    if out is not None:
        _write(found, out)
    if report is not None:
        title = f"Prompts and tokens that bring {Path(opened.source).name} nearest to its range's end"
        findings(report, opened, title=title, section="search", command=command).write_finding(found)
        write(report, against=None, quiet=True)
    if as_json:
        written = {"out": None if out is None else str(out), "report": None if report is None else str(report)}
        screen.print_json({**to_document(found), **written})
        return
    for note in (opened.source, *(f"{note}." for note in opened.notes)):
        screen.print_note(note)
    screen.output.print()
    screen.print_search(found)
    if out is not None:
        screen.print_note(f"Prompts: {out}")
    if report is not None:
        screen.print_note(f"Report: {report / 'report.html'}")


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise MisuseError(f"Finds are written into a new folder, and {folder} is there already; choose another.")


def _write(found: "Search", out: Path) -> None:
    """The prompts as UTF-8 files that hold their text and nothing else, and everything as search.json."""
    from stabilitykit.files import new_folder, write_json, write_text

    _check_new(out)  # it may have come meanwhile
    with new_folder(out) as folder:
        for one in found.finds:
            if one.text is not None and one.file is not None:
                write_text(folder / one.file, one.text)
        write_json(folder / "search.json", to_document(found))


def _command(checkpoint: str, options: "Options", out: Path | None, report: Path | None) -> str:
    words = ["stabilitykit", "search", checkpoint]
    words += ["--dtype", options.dtype] if options.dtype != "float16" else []
    words += [] if options.bos is None else ["--bos" if options.bos else "--no-bos"]
    words += ["--limit", str(options.limit)] if options.limit is not None else []
    words += ["--beam", str(options.beam), "--length", str(options.length)]
    words += [word for name, path in (("--out", out), ("--report", report)) if path for word in (name, str(path))]
    return shlex.join(words)
