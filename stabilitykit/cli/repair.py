"""`stabilitykit repair`: rank what keeps a checkpoint finite in float16, and write one that is."""

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stabilitykit.errors import MisuseError


class StoredDtype(StrEnum):
    float16 = "float16"
    float32 = "float32"


def repair(
    checkpoint: Annotated[
        str,
        typer.Argument(help="gemma3-270m (extra: demo), a Hugging Face folder, a .gguf or .ckpt file, or random:SIZE."),
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Rank remedies for float16 on texts that chose nothing, and with --out write the repaired checkpoint.

    The repair scales everything that a norm reads by one power of two: float32 logits keep every bit, and float16 holds
    what it could not. Exits 0 when a repair was found.
    """
    if checkpoint.startswith("hf:"):
        raise MisuseError("A repair changes a checkpoint's own weights: give the folder, without hf:.")

    from stabilitykit.checkpoints import open_checkpoint
    from stabilitykit.cli import screen
    from stabilitykit.gemma.tokenizer import Tokenizer
    from stabilitykit.remedies.export import check_new, export
    from stabilitykit.remedies.repair import repair as find
    from stabilitykit.remedies.rescale import refuse_folder
    from stabilitykit.remedies.texts import texts

    if out is not None:
        check_new(out)
    refuse_folder(Path(checkpoint))
    with screen.progress_bar() as progress:
        opened = open_checkpoint(checkpoint, progress=lambda done, total: progress("reading weights", done, total))
        chosen = texts(opened.config, Tokenizer(opened.vocabulary), prompts or ())
        found = find(opened, chosen, margin=margin, progress=progress)
        if out is not None:
            export(opened, found, out, dtype.value, progress=lambda done, total: progress("writing", done, total))
    if as_json:
        screen.print_json(
            {
                "checkpoint": opened.source,
                "gamma": found.rescaled.gamma,
                "peak": found.peak,
                "site": found.site,
                "gains_rounded": dict(found.rescaled.rounded),
                "scores": [dataclasses.asdict(score) for score in found.scores],
                "out": None if out is None else str(out),
            }
        )
        return
    for note in (opened.source, *(f"{note}." for note in opened.notes)):
        screen.print_note(note)
    screen.output.print()
    screen.print_scores(found.scores)
    screen.print_repair(found)
    if out is not None:
        screen.print_note(f"Repaired checkpoint: {out}")
