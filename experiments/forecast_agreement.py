"""Whether a forecast comes true: float16's first break as a float32 run predicts it, against a float16 run's own.

    python experiments/forecast_agreement.py                 into reports/forecast_agreement, about ten minutes
    python experiments/forecast_agreement.py --out FOLDER    elsewhere

A cell is one model, one prompt and one rescale γ, a power of two by which everything that a norm reads is scaled.
Factors from 2^-3 to 2^14 carry every model from far below float16's range to far past it.
"""

import argparse
import functools
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stabilitykit.checkpoints import Checkpoint, open_checkpoint
from stabilitykit.diagnosis.forecast import forecast
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.matmul import preferred_matmul
from stabilitykit.report.blocks import Cell, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.style import BLUE, INK, VERMILLION, bits
from stabilitykit.report.write import write_report
from stabilitykit.run.case import run_case
from stabilitykit.run.prompts import parse_prompt
from stabilitykit.run.prompts import tokens as tokens_of
from stabilitykit.scaling.stressed import stressed
from stabilitykit.words import number

if TYPE_CHECKING:
    import matplotlib.figure

ROOT = Path(__file__).parent.parent
REAL = "gemma3-270m"
SHAPE = "layers=4&hidden_size=64&feed_forward=128&heads=4&kv_heads=2&head_dim=16&vocabulary=512"
RANDOM = {
    "Gemma 1, random": "random:gemma-2b?" + SHAPE,
    "Gemma 2, random": "random:gemma2-2b?window=8&" + SHAPE,
    "Gemma 3, random": "random:gemma3-270m?window=8&global_every=2&" + SHAPE,
}
SEEDS = range(4)
EXPONENTS = range(-3, 15)
LENGTH = 32
TEXTS = ("prose", "digits", "scripts", "text: The capital of France is")
NEAR = 1.0  # bits of headroom, on either side


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was forecast and what came of it: sites, None where nothing breaks. `headroom` is the forecast's."""

    model: str
    prompt: str
    exponent: int
    headroom: float
    forecast: str | None
    actual: str | None
    kind: str | None = None
    value: float | None = None

    @property
    def agrees(self) -> bool:
        return self.forecast == self.actual

    @property
    def near(self) -> bool:
        return abs(self.headroom) <= NEAR


def cells() -> Iterator[Outcome]:
    for name, spec in RANDOM.items():
        for seed in SEEDS:
            opened = open_checkpoint(f"{spec}&seed={seed}")
            prompts = {f"seed {seed}, prompt {n}": ids for n, ids in enumerate(random_prompts())}
            yield from of_checkpoint(name, opened, prompts)
    opened = open_checkpoint(REAL)
    tokenizer = Tokenizer(opened.vocabulary)
    real = {}
    for text in TEXTS:
        prompt = parse_prompt(text, ROOT / "experiments")
        for bos in (True, False):
            ids = tokens_of(prompt, tokenizer, bos=bos, length=None if ":" in text else 2 * LENGTH)
            real[f"{text.partition(': ')[2] or text}, {'with' if bos else 'without'} <bos>"] = ids
    yield from of_checkpoint("Gemma 3 270M", opened, real)


def random_prompts() -> Iterator[list[int]]:
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        yield torch.randint(4, 512, (LENGTH,), generator=generator).tolist()


def of_checkpoint(name: str, opened: Checkpoint, prompts: dict[str, list[int]]) -> Iterator[Outcome]:
    for exponent in EXPONENTS:
        wide = stressed(opened, 2.0**exponent)
        found = {prompt: forecast(run_case(wide, ids).recording, "float16") for prompt, ids in prompts.items()}
        del wide
        low = stressed(opened, 2.0**exponent, dtype="float16")
        for prompt, ids in prompts.items():
            kind = preferred_matmul("float16", "cpu")
            first = run_case(low, ids, matmul=kind).recording.first_break()
            if first is not None and first.site.startswith("sampler"):  # past the logits, where no forecast looks
                first = None
            one = found[prompt]
            assert one.headroom is not None
            yield Outcome(
                model=name,
                prompt=prompt,
                exponent=exponent,
                headroom=one.headroom,
                forecast=None if one.first is None else one.first.site,
                actual=None if first is None else first.site,
                kind=None if first is None or first.broke is None else first.broke.kind,
                value=None if first is None or first.broke is None else first.broke.value,
            )


def share(found: Sequence[Outcome]) -> str | None:
    if not found:
        return None
    agreeing = sum(cell.agrees for cell in found)
    return f"{agreeing} of {len(found)}"


def section(found: Sequence[Outcome]) -> Section:
    models = list(dict.fromkeys(cell.model for cell in found))
    agreeing, near = [c for c in found if c.agrees], [c for c in found if c.near]
    rows: list[Sequence[Cell]] = []
    for model in (*models, "all"):
        own = [cell for cell in found if model in (cell.model, "all")]
        parts = ([c for c in own if c.actual], [c for c in own if not c.actual], [c for c in own if c.near], own)
        rows.append((model, *map(share, parts)))
    wrong = [cell for cell in found if not cell.agrees]
    return Section(
        key="agreement",
        title="Forecast and float16 run, side by side",
        opening="For every cell a float32 run says which tensor float16 would break in first, or that it would hold; "
        "then float16 runs. They agree where both name the same site, or both none. What follows the logits is left "
        "out.",
        blocks=[
            Prose(
                f"**{len(agreeing)} of {len(found)} cells agree** ({100 * len(agreeing) / len(found):.1f}%), and of "
                f"the {len(near)} whose largest stored value lies within one bit of float16's end, "
                f"{sum(c.agrees for c in near)}."
            ),
            Figure(
                name="agreement",
                title="What became of each cell, by the headroom that was forecast",
                caption="One mark a cell, a row for each model. Left of 0 the largest stored value is past float16's "
                "end at 65,504. Crosses: float16 broke; circles: it held; rings: forecast and run disagree.",
                alt=f"{len(found)} marks by headroom; those that broke lie left of 0, those that held right of it. "
                f"{len(wrong)} disagree.",
                draw=functools.partial(draw, found=found, models=models),
                size=(8.0, 3.2),
            ),
            Table(
                name="agreeing",
                title="Cells that agree",
                columns=[Column(n) for n in ("model", "float16 broke", "float16 held", "within one bit", "all")],
                rows=rows,
            ),
            Table(
                name="disagreements",
                title="Cells that do not agree",
                columns=[
                    Column("model"), Column("prompt"), Column("rescale"),
                    Column("headroom", unit="bits", format=lambda value: f"{value:.4f}"), Column("forecast"),
                    Column("float16 run"), Column("kind"), Column("value there"),
                ],
                rows=[
                    (c.model, c.prompt, f"2^{c.exponent}", c.headroom, c.forecast or "holds", c.actual or "holds",
                     c.kind, None if c.value is None else number(c.value))
                    for c in wrong
                ],
                note=explanation(wrong),
            ),
            Table(
                name="cells",
                title="Every cell",
                columns=[
                    Column("model"), Column("prompt"), Column("rescale"),
                    Column("headroom", unit="bits", format=bits), Column("forecast"),
                    Column("float16 run"), Column("agree"),
                ],
                rows=[
                    (c.model, c.prompt, f"2^{c.exponent}", c.headroom, c.forecast or "holds", c.actual or "holds",
                     c.agrees)
                    for c in found
                ],
            ),
        ],
    )  # fmt: skip


def explanation(wrong: Sequence[Outcome]) -> str:
    if not wrong:
        return "None."
    return (
        "The float16 run's own rounding errors move values by a few units in the last place, about 0.001 bits each: a "
        "headroom within that of 0, or of a site's just before another's, can fall on either side."
    )


def draw(figure: "matplotlib.figure.Figure", found: Sequence[Outcome], models: Sequence[str]) -> list[Hover]:
    axes = figure.subplots()
    axes.axvspan(-NEAR, NEAR, color=BLUE, alpha=0.08, linewidth=0)
    axes.axvline(0, color=INK, linewidth=1)
    for level, model in enumerate(models):
        own = [cell for cell in found if cell.model == model]
        for place, cell in enumerate(own):
            height = level + 0.3 * (2 * ((place * 7) % 11) / 10 - 1)  # apart, so that none hides another
            broke = cell.actual is not None
            axes.plot(
                cell.headroom, height, "X" if broke else "o", color=VERMILLION if broke else BLUE, markersize=4,
                fillstyle="full" if broke else "none",
            )  # fmt: skip
            if not cell.agrees:
                axes.plot(cell.headroom, height, "o", color=INK, markersize=11, fillstyle="none")
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel("headroom in float16 that was forecast [bits]")
    handles = [
        axes.plot([], [], "X", color=VERMILLION, label="float16 broke")[0],
        axes.plot([], [], "o", color=BLUE, fillstyle="none", label="float16 held")[0],
        axes.plot([], [], "o", color=INK, markersize=9, fillstyle="none", label="forecast and run disagree")[0],
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    return []


def run() -> list[Outcome]:
    found = []
    for cell in cells():
        found.append(cell)
        if not cell.agrees:
            print(f"disagrees: {cell}", file=sys.stderr, flush=True)
        elif len(found) % 50 == 0:
            print(f"{len(found)} cells", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", action="store_true", help="write the report of the cells that are there already")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "forecast_agreement")
    given = parser.parse_args()
    out: Path = given.out
    kept = out / "cells.json"
    if given.kept:
        found = [Outcome(**cell) for cell in json.loads(kept.read_text(encoding="utf-8"))["cells"]]
    else:
        found = run()
        out.mkdir(parents=True, exist_ok=True)
        machine = {"processor": platform.machine(), "torch": torch.__version__, "python": platform.python_version()}
        text = json.dumps({"machine": machine, "cells": [asdict(cell) for cell in found]}, indent=1) + "\n"
        kept.write_text(text, encoding="utf-8")
    page = write_report("Does a forecast of float16 come true?", [section(found)], out)
    print(f"{share(found)} cells agree; within one bit of the limit {share([c for c in found if c.near])}.")
    print(page)


if __name__ == "__main__":
    main()
