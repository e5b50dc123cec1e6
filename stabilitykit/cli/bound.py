"""`stabilitykit bound`: what no prompt can make a tensor exceed, from the weights alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import stabilitykit.cli.options as options
from stabilitykit.choices import BoundDtype


def bound(
    checkpoint: options.BoundedCheckpoint,
    dtype: Annotated[BoundDtype, typer.Option(help="Dtype in which results are stored.")] = "float16",
    report: options.Report = None,
    as_json: options.Json = False,
) -> None:
    """Bound every tensor of the checkpoint for every prompt of any length, from its weights alone, rounding included.

    Beside the bound stand the largest value in three texts and, for Gemma 1 to 3, the largest that a search over hidden
    states found: how far the bound may be from the truth. hf:FOLDER may be a Llama, Mistral, Qwen2, Qwen3 or the text
    part of a Gemma 4, too. Exits 0 whatever was found.
    """
    from stabilitykit.bounds.examine import bound as run
    from stabilitykit.bounds.examine import opened_for
    from stabilitykit.checkpoints import Checkpoint
    from stabilitykit.cli import screen
    from stabilitykit.cli.report import check_report, conclude

    with screen.progress_bar() as progress:
        opened = opened_for(checkpoint, progress)
        check_report(report, opened)
        found = run(opened, dtype=dtype, command=options.command_line(), progress=progress)
    conclude(
        opened,
        found,
        report=report,
        title=f"What no prompt can make {Path(opened.source).name} exceed in {dtype}",
        section="bounds",
        as_json=as_json,
        config=asdict(opened.config) if isinstance(opened, Checkpoint) else opened.recipe.settings,
        show=lambda: screen.print_bounds(found.sites),
    )
