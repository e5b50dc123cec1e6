"""`stabilitykit bound`: what no prompt can make a tensor exceed, from the weights alone."""

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stabilitykit.errors import MisuseError

if TYPE_CHECKING:
    from stabilitykit.bounds import SiteBound


class BoundDtype(StrEnum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def bound(
    checkpoint: Annotated[
        str,
        typer.Argument(help="gemma3-270m (extra: demo), a Hugging Face folder, a .gguf or .ckpt file, or random:SIZE."),
    ],
    dtype: Annotated[BoundDtype, typer.Option(help="The dtype in which results are stored.")] = BoundDtype.float16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Bound every tensor of the checkpoint for every prompt of any length, from its weights alone, rounding included.

    Beside the bound stand the largest value in three texts and the largest that a search over hidden states found: how
    far the bound may be from the truth. Exits 0 whatever was found.
    """
    if checkpoint.startswith("hf:"):
        raise MisuseError("Bounds are of a checkpoint's own weights: give the folder, without hf:.")

    from stabilitykit.bounds import examine
    from stabilitykit.checkpoints import open_checkpoint
    from stabilitykit.cli import screen
    from stabilitykit.gemma.tokenizer import Tokenizer
    from stabilitykit.remedies.rescale import refuse_folder
    from stabilitykit.remedies.texts import texts

    refuse_folder(Path(checkpoint))
    with screen.progress_bar() as progress:
        opened = open_checkpoint(checkpoint, progress=lambda done, total: progress("reading weights", done, total))
        prompts = texts(opened.config, Tokenizer(opened.vocabulary)).choosing
        found = examine(opened, prompts, dtype.value, progress=progress)
    if as_json:
        screen.print_json({"checkpoint": opened.source, "dtype": dtype.value, "sites": [_entry(one) for one in found]})
        return
    for note in (opened.source, *(f"{note}." for note in opened.notes)):
        screen.print_note(note)
    screen.output.print()
    screen.print_bounds(found)


def _entry(one: "SiteBound") -> dict[str, Any]:
    return {
        "site": one.site,
        "label": one.label,
        "layer": one.layer,
        "bound": one.bound if math.isfinite(one.bound) else str(one.bound),
        "found": one.found,
        "observed": one.observed,
        "limit": one.limit,
        "verdict": one.verdict,
    }
