"""`stabilitykit search`: the shortest prompt that overflows, or the one that comes nearest."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import stabilitykit.cli.options as options
from stabilitykit.choices import LowDtype
from stabilitykit.commands import again

if TYPE_CHECKING:
    from stabilitykit.records.search import Search


def search(
    checkpoint: options.Checkpoint,
    dtype: Annotated[LowDtype, typer.Option(help="Low-precision dtype to search for overflows in.")] = "float16",
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Search prompts with <bos> only, or without it only. If not given both, or those without where <bos> "
            "alone overflows.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Scan the first LIMIT tokens of the vocabulary; all if not given.", show_default=False),
    ] = None,
    beam: Annotated[int, typer.Option(help="Beam width: prompts kept and extended at each length.")] = 8,
    length: Annotated[int, typer.Option(help="Longest prompt to try, in tokens, <bos> not counted.")] = 12,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of texts or chats, or a folder of them, to bring to overflow, by shortening, joining and "
            "replacing tokens; repeatable.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the prompts, as files 1.txt and so on, and search.json.")
    ] = None,
    report: options.Report = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Look for the shortest prompt that overflows, or comes nearest to it, and for the most dangerous tokens.

    Scans the vocabulary: each token alone, after <bos> and inside a text. Then the worst tokens are put together, one
    more at a time, until a prompt overflows; --prompts are shortened, or changed by them. Each prompt said to overflow
    was really run. Exits 0 whatever was found.
    """
    from stabilitykit.checkpoints import Checkpoint
    from stabilitykit.cli import screen
    from stabilitykit.cli.report import check_report, conclude
    from stabilitykit.files import check_new
    from stabilitykit.models.devices import parse_device
    from stabilitykit.run.source import opened_by
    from stabilitykit.searches import search as run

    parse_device(device)
    if out is not None:
        check_new(out)
    with screen.progress_bar() as progress:
        opened = opened_by(checkpoint, progress)
        check_report(report, opened)
        found = run(
            opened,
            dtype=dtype,
            bos=bos,
            limit=limit,
            beam=beam,
            length=length,
            prompts=prompts or (),
            device=device,
            command=options.command_line(),
            progress=progress,
        )
    if out is not None:
        _write(found, out)
    conclude(
        opened,
        found,
        report=report,
        title=f"Tokens and prompts that bring {Path(opened.source).name} nearest to overflow in {dtype}",
        section="search",
        as_json=as_json,
        config=asdict(opened.config) if isinstance(opened, Checkpoint) else opened.config,
        show=lambda: screen.print_search(found),
        out=("Prompts", out),
    )
    first = next((one for one in found.finds if one.file is not None and one.text is not None), None)
    if out is not None and first is not None and first.file is not None and not as_json:
        prompt = ("--prompt", f"@{out / first.file}", *(() if first.bos else ("--no-bos",)))
        screen.print_command("To see what becomes of the first", again("profile", checkpoint, *prompt, dtype=dtype))


def _write(found: "Search", out: Path) -> None:
    """The prompts as UTF-8 files that hold their text and nothing else, and everything as search.json."""
    from stabilitykit.files import check_new, new_folder, write_json, write_text
    from stabilitykit.records.document import to_document

    check_new(out)  # it may have come meanwhile
    with new_folder(out) as folder:
        for one in (*found.finds, *found.given):
            if one.text is not None and one.file is not None:
                write_text(folder / one.file, one.text)
        write_json(folder / "search.json", to_document(found))
