"""`stabilitykit verify`: check a repaired checkpoint again."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer


def verify(
    folder: Annotated[Path, typer.Argument(help="What `stabilitykit repair --out` wrote.")],
    proof: Annotated[
        bool,
        typer.Option("--proof", help="Prove from the weights alone that no prompt breaks it; no original is needed."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Check a repaired checkpoint's files against their hashes, and its logits against those of the original.

    With --proof nothing runs: bounds are computed again from the weights, by code that shares nothing with what chose
    them. Exits 0 when everything is as it was written, 1 when something is not.
    """
    from stabilitykit.cli import screen

    if proof:
        _verify_proof(folder, as_json)
        return
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


def _verify_proof(folder: Path, as_json: bool) -> None:
    from stabilitykit.cli import screen
    from stabilitykit.errors import MisuseError
    from stabilitykit.proof.check import check

    if not (folder / "proof.json").is_file():
        raise MisuseError(
            f"A proof lies in proof.json, and {folder} has none. Write one with `stabilitykit repair --proved --out`."
        )
    with screen.progress_bar() as progress:
        found = check(folder, progress=lambda done, total: progress("proving layers", done, total))
    if as_json:
        screen.print_json(
            {"folder": str(folder), "proved": not found.problems, "problems": found.problems, "bounds": found.bounds}
        )
    else:
        screen.print_proof(found.bounds)
        for problem in found.problems:
            screen.output.print(problem, style="bold red")
        if not found.problems:
            screen.output.print("Proved: no prompt makes a tensor leave float16's range.", style="bold green")
    if found.problems:
        raise typer.Exit(1)
