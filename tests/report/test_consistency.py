"""What a report says, held against its own tables: sweeps made at random, the committed one, and mistakes planted."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from consistency import Page, wrong
from swept import (
    broke,
    broken_map,
    broken_run,
    clean_map,
    clean_run,
    header,
    layered_run,
    lengths_case,
    run_case,
    sweep,
)

from stabilitykit.records import BreakKind, FormatCounts, Recording
from stabilitykit.records.lengths import LengthMap, Span
from stabilitykit.records.sweep import Case, Results
from stabilitykit.report.blocks import Table
from stabilitykit.report.markdown import markdown
from stabilitykit.report.sections import section
from stabilitykit.report.tables import csv_text

COMMITTED = Path(__file__).parents[2] / "reports" / "float16_break"
SECTIONS = ("verdict", "lengths", "chain", "peaks", "heat", "exponents", "forecast", "softmax", "error")
RANGE = {"float32": 3.4e38, "bfloat16": 3.39e38, "float16": 65504.0}


def page(results: Results) -> Page:
    sections = [section(results, name) for name in SECTIONS]
    tables = [block for one in sections for block in one.blocks if isinstance(block, Table)]
    return Page.of(markdown("T", sections), {table.name: csv_text(table) for table in tables})


def some_sweep(chance: random.Random, folder: Path) -> Results:
    """Some texts, with or without <bos>, at ranges of lengths and at single ones, in some dtypes."""
    pairs: list[tuple[Case, Recording | LengthMap]] = []
    alone, narrow, wide = ["float16"], ["float16", "bfloat16"], ["bfloat16", "float16", "float32"]
    dtypes = chance.choice([alone, alone, alone, ["bfloat16"], narrow, wide, ["float32", "float16"]])
    names = ["prose", "code", "word: attention", "digits"]
    starts: list[list[bool | None]] = [[True], [False], [True, False], [None]]
    for prompt in chance.sample(names, chance.randint(1, 3)):
        for bos in chance.choice(starts):
            highest = chance.choice([900.0, 65_000.0, 70_000.0, 194_560.0])
            lengths = sorted(chance.sample([3, 17, 64, 512], chance.randint(0, 2)))
            for dtype in dtypes:
                settings = {"prompt": prompt, "bos": bos}
                pairs += [
                    (run_case(dtype, length=length, **settings), some_run(chance, dtype, highest, length))
                    for length in lengths
                ]
                if not lengths or chance.random() < 0.5:
                    pairs.append((lengths_case(dtype, **settings), some_map(chance, dtype, highest)))
    return sweep(folder / "toy", pairs)


def some_run(chance: random.Random, dtype: str, highest: float, length: int) -> Recording:
    """Breaks where it does not hold `highest`, now and then for another reason, or in another layer."""
    tokens = (tuple(range(length)),)
    if highest > RANGE[dtype]:
        kind: BreakKind = "reduction" if chance.random() < 0.3 else "overflow"
        made = broken_run(dtype, error=chance.choice([None, "no `probabilities`"]))
        first = replace(made.records[1], broke=broke(kind, value=highest), exponent_first=12, exponents=(10, 1))
        made.records[1] = first
        if chance.random() < 0.3:
            made.records[0] = replace(made.records[0], site="embed_tokens", layer=None, label="embedding, scaled")
    elif chance.random() < 0.5:
        made = layered_run(dtype, scale=highest / 201)
        made.records = [
            replace(one, exponent_first=-3, exponents=(2, 10), formats=counts(one.amax or 0.0)) for one in made.records
        ]
    else:
        made = clean_run(dtype, amax=highest)
        made.records = [
            replace(one, formats=counts(one.amax or 0.0), label=None if one.layer is None else "residual after MLP")
            for one in made.records
        ]
    made.header = replace(made.header, tokens=tokens)
    return made


def counts(amax: float) -> dict[str, FormatCounts]:
    return {"float16": FormatCounts(int(amax > 65504), 0, 0)}


def some_map(chance: random.Random, dtype: str, highest: float) -> LengthMap:
    longest = chance.choice([1, 9, 64, 256])
    if highest <= RANGE[dtype]:
        return clean_map(dtype, longest=longest, amax=highest)
    made = broken_map(dtype, first=chance.randint(1, longest), longest=longest)
    last = made.spans[-1]
    if last.last - last.first > 3 and chance.random() < 0.6:  # longer texts break in another layer, or not at all
        middle = (last.first + last.last) // 2
        other = (
            replace(last, first=middle, site="layers.0", layer=0)
            if chance.random() < 0.7
            else Span(first=middle, last=last.last, run=last.run)
        )
        made = LengthMap(header(dtype), (*made.spans[:-1], replace(last, last=middle - 1), other), made.peaks)
    return made


@pytest.mark.parametrize("seed", range(60))
def test_what_a_report_says_is_in_its_tables(seed: int, tmp_path: Path) -> None:
    assert wrong(page(some_sweep(random.Random(seed), tmp_path))) == []


@pytest.mark.table
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_what_many_reports_say_is_in_their_tables(seed: int, tmp_path: Path) -> None:
    assert wrong(page(some_sweep(random.Random(seed), tmp_path))) == []


def test_the_committed_report_says_what_its_records_hold() -> None:
    assert wrong(page(Results.open(COMMITTED))) == []


def test_the_committed_page_is_consistent_as_it_stands() -> None:
    tables = {path.stem: path.read_text(encoding="utf-8") for path in (COMMITTED / "tables").glob("*.csv")}
    found = Page.of((COMMITTED / "report.md").read_text(encoding="utf-8"), tables)
    assert len(found.sections) > 8
    assert wrong(found) == []


def planted(folder: Path) -> Page:
    """A text that breaks in float16 from 29 tokens on, whose recorded run breaks too, and bfloat16 above 65,504."""
    wide = layered_run("bfloat16", scale=194_560 / 201)
    wide.records = [replace(one, formats=counts(one.amax or 0.0)) for one in wide.records]
    run = broken_run()
    run.records[1] = replace(run.records[1], exponent_first=12, exponents=(10, 1))
    return page(
        sweep(
            folder / "toy",
            [
                (run_case(), run),
                (run_case("bfloat16"), wide),
                (lengths_case(prompt="code"), broken_map()),
                (lengths_case("bfloat16", prompt="code"), clean_map("bfloat16")),
            ],
        )
    )


# By what is wrong: the section, what it says, and what it is made to say.
MISTAKES: dict[str, tuple[str, str, str]] = {
    "the shortest length": ("verdict", "at 3 tokens, the shortest", "at 4 tokens, the shortest"),
    "a range of lengths": ("verdict", "from 29 to 64 tokens", "from 28 to 64 tokens"),
    "another length": (
        "verdict",
        "`code` from 29 to 64 tokens",
        "`code` at every length that ran, from 1 to 64 tokens",
    ),
    "the number of texts": ("verdict", "both texts break", "the one text breaks"),
    "a clean dtype": ("verdict", "bfloat16 (2 cases", "bfloat16 (3 cases"),
    "its headroom": ("verdict", "at least 1", "at least 2"),
    "that nothing breaks": ("verdict", "What to do", "**Nothing breaks**. What to do"),
    "no length": ("chain", "float16 at 3 tokens", "float16 breaks in layer 0"),
    "another layer": ("peaks", "in layer 0, residual after MLP, at", "in layer 5, residual after MLP, at"),
    "a run not told of": ("heat", "float16 breaks at 3 tokens", "float16 ends at 3 tokens"),
    "no overflow": (
        "heat",
        "4 of 8 tensors in the layers of the bfloat16 run hold a value that overflows",
        "No value of the 8 tensors in the layers of the bfloat16 run overflows",
    ),
    "a narrower run": ("heat", "bfloat16 run: prose", "float16 run: prose"),
}


def test_before_a_mistake_is_planted_there_is_none(tmp_path: Path) -> None:
    assert wrong(planted(tmp_path)) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name: str, tmp_path: Path) -> None:
    found = planted(tmp_path)
    key, right, mistaken = MISTAKES[name]
    assert right in found.sections[key]
    assert wrong(replace(found, sections=found.sections | {key: found.sections[key].replace(right, mistaken)}))


def test_a_site_that_broke_and_is_left_out_is_found(tmp_path: Path) -> None:
    found = planted(tmp_path)
    shown = [row for row in found.tables["exponent-counts-with-bos"] if row["site"] != "residual after MLP"]
    assert any(
        "leave out layer 0" in said
        for said in wrong(replace(found, tables=found.tables | {"exponent-counts-with-bos": shown}))
    )
