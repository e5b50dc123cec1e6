"""How often the diagnosis is right: faults whose answer is known, a table of them and others drawn from a seed.

    python experiments/truth.py                  a fresh seed, into reports/truth, some minutes
    python experiments/truth.py --seed 7         the same faults as another run drew
    python experiments/truth.py --kept           writes the report of the judgements that are there already

Every fault is planted in a tiny model, and what is expected of a diagnosis follows from how it was planted, or from
an independent run in float64: see tests/truth. At the level of operators an answer is exact if every column that can
be known agrees and nothing misleading is said; at those of modules and layers it is enough that nothing false is.
Every fault of the table is then diagnosed by experiment, and what was tried is held to what cures it by hand.
"""

# ruff: noqa: E402  the path to the faults comes before what is imported from there

import argparse
import functools
import json
import os
import platform
import secrets
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[0] = str(ROOT / "tests")  # the faults; this folder has a truth of its own

import torch
import transformers
from truth.generated import generate
from truth.row import ROOTS, Row
from truth.score import LEVELS, SCORES, Judgement, judge
from truth.table import CONTROLS, TABLE
from truth.tried import Tried, tried

from stabilitykit.files import write_text
from stabilitykit.report.blocks import Block, Cell, Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.parts.bars import Part, stacked_bars
from stabilitykit.report.write import write_report

if TYPE_CHECKING:
    import matplotlib.figure

DRAWN = 200  # faults drawn from the seed
WORDS = {
    "exact": "every column that can be known agrees",
    "acceptable": "site and kind agree, and something is left unsaid",
    "misleading": "the site agrees, and something that is said is false",
    "wrong": "another site, nothing said of a fault, or an alarm without one",
    "raised": "the recorder or the diagnosis raised an error",
}


def rows(seed: int) -> dict[str, tuple[Row, ...]]:
    return {"table": TABLE, "controls": CONTROLS, "drawn": tuple(generate(seed, DRAWN))}


def judged(seed: int) -> Iterator[tuple[str, Judgement]]:
    for part, own in rows(seed).items():
        for row in own:
            for level in LEVELS:
                yield part, judge(row, level)


def share(found: Sequence[Judgement], *scores: str) -> str:
    own = sum(one.score in scores for one in found)
    return f"{own:,} of {len(found):,} ({100 * own / len(found):.1f}%)" if found else "none"


def counts(found: Sequence[Judgement]) -> list[Cell]:
    by_score = Counter(one.score for one in found)
    return [len(found), *(by_score[score] for score in SCORES)]


def table(name: str, title: str, first: str, groups: dict[str, Sequence[Judgement]]) -> Table:
    return Table(
        name=name,
        title=title,
        columns=[Column(first), Column("faults"), *(Column(score) for score in SCORES)],
        rows=[[group, *counts(own)] for group, own in groups.items()],
        alarming=frozenset(
            number for number, own in enumerate(groups.values()) if any(o.score in ("wrong", "raised") for o in own)
        ),
    )


def misses(found: Sequence[tuple[str, Judgement]], level: str) -> Table:
    """At operators whatever is not exact; at the other levels whatever is wrong."""
    bad = ("acceptable", "misleading", "wrong", "raised") if level == "operators" else ("wrong", "raised")
    order = {score: number for number, score in enumerate(reversed(SCORES))}
    missed = sorted(
        (o for _, o in found if o.level == level and o.score in bad), key=lambda o: (order[o.score], o.family, o.key)
    )
    return Table(
        name=f"misses-{level}",
        title=f"Every miss at level {level}",
        columns=[Column(name) for name in ("fault", "judged", "why", "expected", "said")],
        rows=[[o.key, o.score, "; ".join(o.why), o.expected, o.said] for o in missed],
        note="None." if not missed else "",
    )


def section(found: Sequence[tuple[str, Judgement]], seed: int) -> list[Section]:
    operators = [o for part, o in found if o.level == "operators" and part != "controls"]
    controls = [o for part, o in found if o.level == "operators" and part == "controls"]
    coarse = [o for _, o in found if o.level != "operators"]
    families = list(dict.fromkeys(o.family for o in operators))
    kinds = sorted({o.kind or "any" for o in operators})
    blocks: list[Block] = [
        Prose(
            f"**{share(operators, 'exact')} of the planted faults are told exactly** at level operators; "
            f"{sum(o.score == 'wrong' for o in operators)} are told wrongly, and in "
            f"{sum(o.score == 'raised' for o in operators)} an error was raised. Of {len(controls)} runs in which "
            f"nothing is wrong, {sum(o.score != 'exact' for o in controls)} give an alarm. At levels modules and "
            f"layers "
            f"{sum(o.score in ('wrong', 'raised') for o in coarse)} of {len(coarse):,} answers are wrong. "
            f"Seed {seed}."
        ),
        Table(
            name="scores",
            title="What the judgements mean",
            columns=[Column("judgement"), Column("at level operators")],
            rows=[[score, WORDS[score]] for score in SCORES],
        ),
        table("by-part", "By part", "part", {
            f"{part}, {level}": [o for p, o in found if p == part and o.level == level]
            for part in ("table", "controls", "drawn") for level in LEVELS
        }),
        Figure(
            name="families",
            title="Judgements by family",
            caption="Faults of the table and of the seed at level operators, controls left out.",
            alt=f"A bar for each of {len(families)} families, parted by judgement.",
            draw=functools.partial(draw, found=operators, families=families),
            size=(8.0, 5.5),
        ),
        table("by-family", "By family", "family", {f: [o for o in operators if o.family == f] for f in families}),
        table("by-kind", "By kind", "kind", {k: [o for o in operators if (o.kind or "any") == k] for k in kinds}),
        table("by-topic", "By what it is about, of the table", "topic", {
            topic: [o for part, o in found if part == "table" and o.level == "operators" and o.root == root]
            for root, topic in ROOTS.items()
        }),
    ]  # fmt: skip
    return [
        Section(
            key="truth",
            title="Planted faults and what is said of them",
            opening="Each fault is planted in a tiny model with random weights, and its answer follows from how it "
            "was planted. Small models have no trained weights: what breaks in them is known, how often it does in "
            "trained ones is not.",
            blocks=blocks,
        ),
        Section(
            key="misses",
            title="Every miss",
            opening="What was expected, and what was said. A column that is named alone was left unsaid.",
            blocks=[misses(found, level) for level in LEVELS],
        ),
    ]


def cures(found: Sequence[Tried]) -> Section:
    """What was tried of each fault, against what cures it where every change was made by hand."""
    names = sorted({name for one in found for name in one.cured})
    by_name = {name: [one for one in found if name in one.cured] for name in names}
    missed = [one for one in found if one.faults]
    curable = sum(bool(one.cured) for one in found)
    uncured = sum(bool(one.untried or one.unshown) for one in found)
    in_vain, untrue = (sum(bool(getattr(one, name)) for one in found) for name in ("advised", "false"))
    return Section(
        key="tried",
        title="What was tried, and what cures",
        opening="Each remedy was applied by hand to every fault of the table, without the code that is judged here. "
        "What it cures by hand, diagnose has to try and to show cured; what failed must not be advised.",
        blocks=[
            Prose(
                f"Of {len(found)} faults and controls, {curable} are cured by some change by hand. "
                f"**In {uncured} a cure was not tried, or not shown to cure; in {in_vain} something is advised that "
                f"was tried in vain**; in {untrue} a change is said to cure and does not."
            ),
            Table(
                name="by-change",
                title="By change",
                columns=[Column(name) for name in ("change", "cures by hand", "tried", "shown to cure")],
                rows=[
                    [
                        name,
                        len(own),
                        sum(name not in one.untried for one in own),
                        sum(name not in (*one.untried, *one.unshown) for one in own),
                    ]
                    for name, own in by_name.items()
                ],
            ),
            Table(
                name="missed-cures",
                title="Every miss",
                columns=[Column("fault"), Column("what"), Column("cured by hand")],
                rows=[[one.key, "; ".join(one.faults), ", ".join(one.cured)] for one in missed],
                note="None." if not missed else "",
            ),
        ],
    )


def draw(figure: "matplotlib.figure.Figure", found: Sequence[Judgement], families: Sequence[str]) -> Sequence[Hover]:
    parts = [
        Part(
            name=score,
            values=[sum(o.family == family and o.score == score for o in found) for family in families],
            colour=number,
            hatch=hatch,
        )
        for number, (score, hatch) in enumerate(zip(SCORES, ("", "..", "//", "xx", "++"), strict=True))
    ]
    axes, hovers = stacked_bars(figure, families, parts, say=lambda value: f"{value:.0f}")
    axes.set_yticks(range(len(families)), families)
    axes.invert_yaxis()
    axes.set_xlabel("faults")
    figure.legend(loc="outside upper right", ncols=len(SCORES))
    return hovers


def run(seed: int) -> list[tuple[str, Judgement]]:
    total = sum(map(len, rows(seed).values())) * len(LEVELS)
    found: list[tuple[str, Judgement]] = []
    began = time.monotonic()
    for part, one in judged(seed):
        found.append((part, one if one.why else replace(one, said="")))  # what is right need not be kept
        if one.score in ("wrong", "raised"):
            print(f"{one.score}: {one.key} ({one.level}): {'; '.join(one.why)}", file=sys.stderr, flush=True)
        if len(found) % 100 == 0:
            print(f"{len(found):,} of {total:,}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def try_all() -> list[Tried]:
    rows = (*TABLE, *CONTROLS)
    found: list[Tried] = []
    for one in rows:
        found.append(tried(one))
        if found[-1].faults:
            print(f"{one.key}: {'; '.join(found[-1].faults)}", file=sys.stderr, flush=True)
        if len(found) % 100 == 0:
            print(f"tried on {len(found):,} of {len(rows):,}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="of the faults that are drawn; default: a fresh one")
    parser.add_argument("--kept", action="store_true", help="write the report of the judgements that are there already")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "truth")
    given = parser.parse_args()
    out: Path = given.out
    kept = out / "judgements.json"
    if given.kept:
        saved = json.loads(kept.read_text(encoding="utf-8"))
        seed = saved["seed"]
        found = [(one.pop("part"), Judgement(**one | {"why": tuple(one["why"])})) for one in saved["judgements"]]
        attempts = [Tried(**{name: _tuple(value) for name, value in one.items()}) for one in saved["tried"]]
    else:
        seed = secrets.randbelow(2**32) if given.seed is None else given.seed
        print(f"seed {seed}", flush=True)
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        warnings.simplefilter("ignore")
        found, attempts = run(seed), try_all()
        out.mkdir(parents=True, exist_ok=True)
        machine = {
            "processor": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        kept_of = [asdict(replace(one, said="", trials={})) for one in attempts]
        judgements = [{"part": p} | asdict(o) for p, o in found]
        whole = {"seed": seed, "machine": machine, "judgements": judgements, "tried": kept_of}
        write_text(kept, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    page = write_report("Is the diagnosis right?", [*section(found, seed), cures(attempts)], out)
    planted = [o for part, o in found if o.level == "operators" and part != "controls"]
    print(f"{share(planted, 'exact')} exact at level operators, seed {seed}.")
    print(page)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
