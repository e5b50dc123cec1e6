"""`stabilitykit verify`: check a repaired model again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import stabilitykit.cli.options as options


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that `stabilitykit repair --out` wrote.", show_default=False)],
    proof: Annotated[
        bool,
        typer.Option(
            "--proof", help="Prove from the weights alone that no prompt overflows; the original is not needed."
        ),
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Check a repaired model's files against their hashes, and what it computes against the original, bit by bit.

    Without the original, the folder with its scaling undone takes its place, and the output says so. With --proof
    nothing runs: bounds are computed again from the weights, by code that shares nothing with what chose them. Exits 0
    when everything is as it was written, 1 when something is not.
    """
    from stabilitykit.cli import screen
    from stabilitykit.records.document import to_document
    from stabilitykit.remedies.verify import verify as check
    from stabilitykit.remedies.verify import verify_proof

    with screen.progress_bar() as progress:
        if proof:
            proved = verify_proof(folder, progress=progress)
        else:
            found = check(folder, trust_remote_code=trust_remote_code, progress=progress)
    problems = proved.problems if proof else found.problems
    head = {"folder": str(folder), "proved" if proof else "verified": not problems, "problems": list(problems)}
    if as_json and proof:
        screen.print_json(head | {"assumptions": list(proved.assumptions), "bounds": proved.bounds})
    elif as_json:
        screen.print_json(head | to_document(found.check))
    elif proof:
        screen.print_proof(proved.bounds, proved.assumptions)
        _print(problems, "Proved: no prompt makes a tensor overflow in float16.")
    else:
        screen.print_check(found.check)
        _print([f"{problem}." for problem in problems], "Everything is as it was written.")
    if problems:
        raise typer.Exit(1)


def _print(problems: Sequence[str], otherwise: str) -> None:
    from stabilitykit.cli import screen

    for problem in problems:
        screen.output.print(problem, style="bold red")
    if not problems:
        screen.output.print(otherwise, style="bold green")
