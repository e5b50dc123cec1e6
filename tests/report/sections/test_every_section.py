"""What holds for every section of the registry, whatever the sweep came to."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bounded import bounds
from matplotlib.figure import Figure as Canvas
from scored import ranking
from searched import search
from swept import (
    broken_map,
    broken_run,
    check,
    clean_map,
    deviation,
    layered_run,
    lengths_case,
    logits_error,
    memory,
    memory_case,
    run_case,
    sweep,
)  # fmt: skip

from stabilitykit.formats import FORMATS, NumberFormat
from stabilitykit.records import FormatCounts, Recording
from stabilitykit.records.lengths import LengthMap
from stabilitykit.records.sweep import Case, Failure, Footprint, Results, Shortage
from stabilitykit.report.blocks import Explorer, Figure, Section, Table
from stabilitykit.report.figures import draw
from stabilitykit.report.html import html
from stabilitykit.report.markdown import markdown
from stabilitykit.report.sections import SECTIONS
from stabilitykit.report.tables import csv_text

EVERY = pytest.mark.parametrize("name", SECTIONS)

# What a sentence says that warns of a wrong conclusion.
WARNS = re.compile(r"\b(may|not|no|nothing|another|other|meaningless|differently)\b")


def told(run: Recording) -> Recording:
    """With what a forecast, and an error against float32, are made of."""
    counts = {name: FormatCounts(1, 2, 3) for name in ("float16", "bfloat16")}
    records = [replace(r, stored_dtype="float16", formats=counts, deviation=deviation(40.0)) for r in run]
    header = replace(run.header, formats=tuple(counts), logits_error=logits_error())
    return Recording(header, records)


def empty(folder: Path) -> Results:
    return sweep(folder / "toy", [])


def unfinished(folder: Path) -> Results:
    failure = Failure(kind="killed", reason="the process was ended by SIGKILL")
    return sweep(folder / "toy", [(run_case(), failure), (lengths_case(), None), (memory_case(), failure)])


def broken(folder: Path) -> Results:
    return sweep(folder / "toy", [(run_case(), broken_run()), (lengths_case(), broken_map())])


def full(folder: Path, **changes: object) -> Results:
    """A sweep in which every section has all that it can show."""
    starved = Shortage(dtype="float32", length=64, device="cpu", needed=1000, room=500, outcome="killed", reason="it")
    released = Footprint(dtype="float16", length=64, device="cuda", weights=10, cache=1, activations=1)
    pairs: list[tuple[Case, Recording | LengthMap | Footprint | Shortage | Failure | None]] = [
        (run_case(), told(layered_run())),
        (run_case("float32"), told(layered_run("float32"))),
        (run_case(bos=False), broken_run()),
        (lengths_case(), broken_map(checks=(check(),))),
        (lengths_case("float32"), clean_map("float32")),
        (memory_case(), memory()),
        (Case(kind="shortage", settings={"dtype": "float32", "length": 64}), starved),
        (Case(kind="footprint", settings={"model": "gemma-7b", "dtype": "float16", "length": 64}), released),
    ]
    results = sweep(folder / "toy", pairs, **changes)
    for finding in (ranking(), bounds(), search()):
        results.write_finding(finding)
    return results


def alike(folder: Path) -> Results:
    """Groups of runs whose names differ by what no file's name has."""
    prompts = ("text: a b", "text: a-b", "text: A B", "@a b", "@a_b")
    return sweep(folder / "toy", [(run_case(prompt=prompt), broken_run()) for prompt in prompts])


SWEEPS: dict[str, Callable[[Path], Results]] = {
    "empty": empty, "unfinished": unfinished, "broken": broken, "alike": alike, "full": full,
}  # fmt: skip


@EVERY
@pytest.mark.parametrize("kind", SWEEPS)
def test_it_is_sound_and_can_be_written_whatever_the_sweep_came_to(name: str, kind: str, tmp_path: Path) -> None:
    found = SECTIONS[name](SWEEPS[kind](tmp_path))
    assert found.key == name
    assert found.title
    assert found.opening.endswith(".")
    named = [block.name for block in found.blocks if isinstance(block, Figure | Table)]
    assert len(named) == len(set(named))
    for block in found.blocks:
        if isinstance(block, Table):
            columns = [column.name for column in block.columns]
            assert len(columns) == len(set(columns)), block.name
            assert all(len(row) == len(columns) for row in block.rows)
            assert all(0 <= row < len(block.rows) for row in block.alarming)
            assert csv_text(block).count("\n") >= len(block.rows) + 1
        elif isinstance(block, Figure):
            assert block.title
            assert len(block.alt.split()) > 3, block.name
    assert f"## {found.title}" in markdown("T", [found])
    drawings = {block.name: "<svg/>" for block in found.blocks if isinstance(block, Figure)}
    assert f'id="{name}"' in html("T", [found], drawings)


@EVERY
def test_it_shows_something_of_a_full_sweep_and_opens_with_what_misleads(name: str, tmp_path: Path) -> None:
    found = SECTIONS[name](full(tmp_path))
    assert any(isinstance(block, Explorer) or (isinstance(block, Table) and block.rows) for block in found.blocks)

    assert WARNS.search(found.opening)
    assert len(re.findall(r"[.:;]( |$)", found.opening)) >= 2


@EVERY
def test_without_anything_finished_there_is_one_sentence_on_why(name: str, tmp_path: Path) -> None:
    found = SECTIONS[name](unfinished(tmp_path))
    assert not any(isinstance(block, Figure) for block in found.blocks)
    if name != "provenance":  # which tells of the cases themselves
        assert not any(isinstance(block, Table) for block in found.blocks)
        assert re.search(r"\b(no|none|not|nothing)\b", found.opening, re.IGNORECASE)


def texts(found: Section) -> str:
    """All that a reader sees of a section, figures' captions and hovers too."""
    said = [found.opening]
    for block in found.blocks:
        if isinstance(block, Table):
            said += [block.title, block.note, *(column.name for column in block.columns)]
        elif isinstance(block, Figure):
            said += [block.title, block.caption, *(hover.text for hover in block.draw(Canvas()))]
        else:
            said.append(block.text)
    return " ".join(said)


@pytest.mark.parametrize("form", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["peaks", "heat", "exponents", "lengths"])
def test_another_format_can_be_judged_by(name: str, form: str, tmp_path: Path) -> None:
    by_float16 = SECTIONS[name](full(tmp_path / "float16"))
    found = SECTIONS[name](full(tmp_path / "other", format=form))
    assert form in texts(found)
    assert texts(found) != texts(by_float16)


def test_headroom_is_that_of_the_format_in_question(tmp_path: Path) -> None:
    found = SECTIONS["heat"](full(tmp_path, format="float8_e4m3fn"))
    assert "the least headroom in the float32 run is 1.2 bits" in texts(found)  # log2(448 / 201)
    assert "exceeded the float8_e4m3fn maximum, 448" in found.opening


@EVERY
def test_a_format_that_nobody_here_has_heard_of_is_judged_by_and_drawn(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "float6", NumberFormat(name="float6", precision=3, emax=3, emin=-2, bits=6))
    for block in SECTIONS[name](full(tmp_path, format="float6")).blocks:
        if isinstance(block, Figure):
            assert draw(block).svg
