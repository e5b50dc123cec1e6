"""Which families of models can be repaired exactly, and what stands in the way of the others.

    python experiments/any_model.py                every family of the table, some minutes
    python experiments/any_model.py Llama "GPT-2"  these, and the others as they were measured before
    python experiments/any_model.py --kept         writes the report of what was measured before

Every family is a small model with random weights from its released config, in which something is made to overflow
float16: see tests/scaled. Its repair, and random points of the space that its equations leave, are run on prompts that
no trace has seen, with a cache, padded and generating, in every implementation of attention that the family has.
"""

# ruff: noqa: E402  the path to the table comes before what is imported from there

import argparse
import copy
import functools
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[0] = str(ROOT / "tests")  # the table

import torch
import transformers
from scaled.entry import Entry, error, outputs, same
from scaled.solved import drawn
from scaled.table import ENTRIES
from torch import Tensor, nn

from stabilitykit.files import write_json
from stabilitykit.models.machine import machine, versions
from stabilitykit.records.scaling import Scaling
from stabilitykit.report.blocks import Block, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.style import series_style
from stabilitykit.report.write import write_report
from stabilitykit.scaling.explain import obstacles
from stabilitykit.scaling.look import look

if TYPE_CHECKING:
    import matplotlib.figure

POINTS = 4  # of the space that the equations leave, of each family


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came out for a family. Errors are the largest difference of logits from float32; None where they are not
    finite.
    """

    family: str
    margin: float
    peak: float
    site: str
    before: float | None
    bfloat16: float
    exact: bool
    moved: int
    settings: dict[str, int]
    runs: int  # held against the original's, bit for bit: the repair's
    equal: int
    point_runs: int  # those of random points
    point_equal: int
    reloaded: bool | None
    after: float | None
    unknowns: int
    equations: int
    operators: int
    look_seconds: float
    solve_seconds: float
    obstacles: tuple[str, ...]
    approximate: float | None = None  # in float32
    approximate_half: float | None = None


def finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def measured(entry: Entry) -> Row:
    model = entry.model()
    expected = outputs(model, entry.run)
    began = time.perf_counter()
    traced = look(model, copy.deepcopy(model).bfloat16(), [entry.run], entry.blueprint())
    looked = time.perf_counter()
    solution = traced.solve(margin=entry.margin)
    solved = time.perf_counter()
    peak, site = max(traced.peaks.values())

    def low(one: nn.Module, dtype: torch.dtype) -> float:
        return error(outputs(copy.deepcopy(one).to(dtype), entry.run), expected)

    repaired = entry.scaled(model, solution.scaling)
    held = compared(entry, model, [solution.scaling])
    points = [drawn(traced.graph, traced.settings, seed) for seed in range(POINTS)]
    held_points = compared(entry, model, points)
    approximate = None
    if not solution.is_exact:
        soft = traced.solve(margin=entry.margin, soft=True)
        approximate = None if soft.short else entry.scaled(model, soft.scaling)
    return Row(
        family=entry.name,
        margin=entry.margin,
        peak=peak,
        site=site,
        before=finite(low(model, torch.float16)),
        bfloat16=low(model, torch.bfloat16),
        exact=solution.is_exact,
        moved=solution.moved,
        settings=dict(solution.scaling.settings),
        runs=len(held),
        equal=sum(held),
        point_runs=len(held_points),
        point_equal=sum(held_points),
        reloaded=reloaded(entry, model, repaired) if solution.is_exact else None,
        after=finite(low(repaired, torch.float16)) if solution.is_exact else None,
        unknowns=solution.unknowns,
        equations=solution.equations,
        operators=traced.graph.operators,
        look_seconds=looked - began,
        solve_seconds=solved - looked,
        obstacles=obstacles(traced, solution, entry.margin),
        approximate=None if approximate is None else finite(error(outputs(approximate, entry.run), expected)),
        approximate_half=None if approximate is None else finite(low(approximate, torch.float16)),
    )


def compared(entry: Entry, model: nn.Module, scalings: Sequence[Scaling]) -> list[bool]:
    """Whether each run of each scaled model gives the bits of the original."""
    found = []
    for attention in entry.attentions:
        runs = (entry.run, *entry.unseen.values())
        plain = entry.same(model, attention=attention)
        expected: list[list[Tensor]] = [outputs(plain, run) for run in runs]
        for scaling in scalings:
            moved = entry.scaled(model, scaling, attention)
            found += [same(outputs(moved, run), one) for run, one in zip(runs, expected, strict=True)]
    return found


def reloaded(entry: Entry, model: Any, repaired: Any) -> bool:
    """Whether both, saved and read again by their library alone, agree bit for bit."""
    read = []
    with tempfile.TemporaryDirectory() as folder:
        for place, one in enumerate((model, repaired)):
            one.save_pretrained(f"{folder}/{place}")
            again = type(one).from_pretrained(
                f"{folder}/{place}", dtype=torch.float32, attn_implementation=entry.attentions[0]
            )
            read.append(outputs(again.eval(), entry.run))
    return same(*read)


def number(value: float) -> str:
    return f"{value:.2g}"


def section(rows: Sequence[Row]) -> list[Section]:
    exact = [row for row in rows if row.exact]
    equal = sum(row.equal for row in exact)
    closer = sum(row.after is not None and row.after < row.bfloat16 for row in exact)
    blocks: list[Block] = [
        Prose(
            f"**{len(exact)} of {len(rows)} entries have an exact repair.** In {equal} of "
            f"{sum(row.runs for row in exact)} runs of the repaired models float32 logits equal the original's bit for "
            f"bit, and in {sum(row.point_equal for row in rows)} of {sum(row.point_runs for row in rows)} runs at "
            f"random points of the space that the equations leave. In float16 {closer} of the {len(exact)} repaired "
            "models are finite and closer to float32 than bfloat16 is."
        ),
        Table(
            name="families",
            title="Families",
            columns=[
                Column("family"),
                Column("peak", format=lambda value: f"{value:,.0f}"),
                Column("where"),
                Column("margin", unit="bits"),
                Column("float16 before", format=number),
                Column("exact repair"),
                Column("float32 runs equal"),
                Column("read again, equal"),
                Column("float16 after", format=number),
                Column("bfloat16", format=number),
            ],
            rows=[
                [
                    row.family, row.peak, row.site, row.margin, "not finite" if row.before is None else row.before,
                    "yes" if row.exact else "no", f"{row.equal} of {row.runs}" if row.exact else None,
                    None if row.reloaded is None else "yes" if row.reloaded else "no", row.after, row.bfloat16,
                ]
                for row in rows
            ],
            alarming=frozenset(place for place, row in enumerate(rows) if row.equal < row.runs),
            note="The last two columns and float16 before are the largest difference of an output from float32's.",
        ),
        Figure(
            name="errors",
            title="Errors after the repair",
            caption="The largest difference from the float32 logits, on the run that was traced.",
            alt=f"Two marks for each of {len(exact)} families: float16 after its repair, and bfloat16, further right.",
            draw=functools.partial(draw, rows=exact),
            size=(8.0, 8.0),
        ),
        Table(
            name="programs",
            title="Programs",
            columns=[
                Column("family"),
                Column("operators"),
                Column("unknowns"),
                Column("equations"),
                Column("parameters moved"),
                Column("settings"),
                Column("points, runs equal"),
                Column("trace and peaks", unit="s", format=lambda value: f"{value:.2f}"),
                Column("program", unit="s", format=lambda value: f"{value:.3f}"),
            ],
            rows=[
                [
                    row.family, row.operators, row.unknowns, row.equations, row.moved,
                    ", ".join(f"{key} × 2^{exponent}" for key, exponent in row.settings.items()) or None,
                    f"{row.point_equal} of {row.point_runs}", row.look_seconds, row.solve_seconds,
                ]
                for row in rows
            ],
        ),
    ]  # fmt: skip
    others = [row for row in rows if not row.exact]
    return [
        Section(
            key="families",
            title="Exact repairs by family",
            opening="Models are small and their weights random: that a repair is exact does not depend on either, but "
            "errors and the exponents that are chosen do.",
            blocks=blocks,
        ),
        Section(
            key="obstacles",
            title="What stands in the way of the others",
            opening="Of the equations that an exact repair would have to give up, the cheapest are named. Where a "
            "constant beside a mean of squares, or a small bound, is all that is given up, there is a repair that is "
            "exact but for that: its error follows.",
            blocks=[
                Table(
                    name="obstacles",
                    title="Families without an exact repair",
                    columns=[
                        Column("family"),
                        Column("what stands in the way"),
                        Column("approximate, float32", format=number),
                        Column("approximate, float16", format=number),
                        Column("bfloat16", format=number),
                    ],
                    rows=[
                        [row.family, " ".join(row.obstacles), row.approximate, row.approximate_half, row.bfloat16]
                        for row in others
                    ],
                )
            ],
        ),
    ]


def draw(figure: "matplotlib.figure.Figure", rows: Sequence[Row]) -> Sequence[Hover]:
    axes = figure.subplots()
    places = range(len(rows))
    kinds = [
        ("float16, repaired", [row.after or math.nan for row in rows]),
        ("bfloat16", [row.bfloat16 for row in rows]),
    ]
    for number, (name, values) in enumerate(kinds):
        axes.scatter(values, places, label=name, color=series_style(number)["color"], marker="os"[number])
    axes.set_xscale("log")
    axes.set_yticks(places, [row.family for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("largest difference from float32")
    figure.legend(loc="outside upper right", ncols=2)
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(ENTRIES)}; default: all")
    parser.add_argument("--kept", action="store_true", help="write the report of what was measured before")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "any_model")
    given = parser.parse_args()
    out: Path = given.out
    kept = out / "families.json"
    saved = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"rows": []}
    rows = {one["family"]: Row(**one | {"obstacles": tuple(one["obstacles"])}) for one in saved["rows"]}
    if not given.kept:
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        for name in given.families or ENTRIES:
            rows[name] = measured(ENTRIES[name])
            print(f"{name}: {'exact' if rows[name].exact else ' '.join(rows[name].obstacles)}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        whole = {
            "machine": machine("cpu"),
            "versions": versions(),
            "rows": [asdict(rows[n]) for n in ENTRIES if n in rows],
        }
        write_json(kept, whole)
    print(write_report("Which models can be repaired exactly?", section([rows[n] for n in ENTRIES if n in rows]), out))


if __name__ == "__main__":
    main()
