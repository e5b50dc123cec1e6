"""`stabilitykit verify`: check a repaired checkpoint again."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer


def verify(
    folder: Annotated[Path, typer.Argument(help="What `stabilitykit repair --out` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Check a repaired checkpoint's files against their hashes, and its logits against those of the original.

    Exits 0 when everything is as repair.json says, 1 when something is not.
    """
    from stabilitykit.cli import screen
    from stabilitykit.remedies.verify import verify as check

    with screen.progress_bar() as progress:
        found = check(folder, progress=progress)
    if as_json:
        screen.print_json(
            {"folder": str(folder), "verified": not found.problems, "problems": list(found.problems)}
            | {"promised": found.promised, "score": dataclasses.asdict(found.score)}
        )
    else:
        screen.print_scores([found.score])
        for problem in found.problems:
            screen.output.print(f"{problem}.", style="bold red")
        if not found.problems:
            screen.output.print("Everything is as it was written.", style="bold green")
    if found.problems:
        raise typer.Exit(1)
