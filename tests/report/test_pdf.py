"""A report as PDF: by a real browser where there is one, and with what is no browser at all."""

import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Result
from swept import broken_map, broken_run, lengths_case, run_case, sweep

from stabilitykit.errors import MisuseError, StabilityKitError
from stabilitykit.report.blocks import Section
from stabilitykit.report.make import make_report
from stabilitykit.report.pdf import BROWSERS, find_browser
from stabilitykit.report.write import write_report

SECTIONS = [Section(key="s", title="S", opening="O.")]


def browser(folder: Path, does: str, name: str = "chromium") -> Path:
    """A program of that name which does something else; `$out` is the file that it is asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    find = 'for a in "$@"; do case $a in --print-to-pdf=*) out=${a#--print-to-pdf=};; esac; done'
    path.write_text(f"#!/bin/sh\n{find}\n{does}\n")
    path.chmod(0o755)
    return path


def test_without_a_browser_it_says_what_was_looked_for_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sweep(tmp_path / "toy", [(run_case(), broken_run())]).folder
    before = sorted(folder.rglob("*"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(MisuseError, match="A PDF is printed by a browser, and none is on the PATH") as raised:
        make_report(folder, pdf=True)
    assert all(name in str(raised.value) for name in BROWSERS)
    assert sorted(folder.rglob("*")) == before


def test_any_of_the_browsers_will_do_the_first_of_the_list_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    edge = browser(tmp_path / "bin", "exit 0", "msedge")
    assert find_browser() == edge
    chrome = browser(tmp_path / "bin", "exit 0", "google-chrome")
    assert find_browser() == chrome


NOTHING = "echo it broke >&2; exit 1"
HALF = 'printf "%%PDF-1.4 half" > "$out"; echo it broke >&2'
TEXT = 'echo text > "$out"; echo it broke >&2'


@pytest.mark.parametrize("does", [NOTHING, HALF, TEXT])
def test_a_browser_that_fails_leaves_no_pdf_not_even_an_old_one(tmp_path: Path, does: str) -> None:
    whole = browser(tmp_path / "whole", 'printf "%%PDF-1.4 all %%%%EOF" > "$out"')
    write_report("One", SECTIONS, tmp_path / "out", browser=whole)
    assert (tmp_path / "out" / "report.pdf").read_bytes() == b"%PDF-1.4 all %%EOF"
    with pytest.raises(StabilityKitError, match=r"made no PDF of .*It said: it broke\. Open the page in a browser"):
        write_report("Two", SECTIONS, tmp_path / "out", browser=browser(tmp_path / "bad", does))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.files.json",
        "report.html",
        "report.md",
    ]


def test_a_report_without_a_pdf_removes_that_of_an_earlier_one_and_no_other(tmp_path: Path) -> None:
    whole = browser(tmp_path / "whole", 'printf "%%PDF-1.4 all %%%%EOF" > "$out"')
    write_report("One", SECTIONS, tmp_path / "out", browser=whole)
    write_report("Two", SECTIONS, tmp_path / "out")
    assert not (tmp_path / "out" / "report.pdf").exists()
    (tmp_path / "out" / "report.pdf").write_text("mine")
    write_report("Three", SECTIONS, tmp_path / "out")
    with pytest.raises(MisuseError, match="is no report's: it would be overwritten"):
        write_report("Four", SECTIONS, tmp_path / "out", browser=whole)
    assert (tmp_path / "out" / "report.pdf").read_text() == "mine"


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser that prints: none is on the PATH")
def test_a_browser_prints_the_whole_page(tmp_path: Path) -> None:
    results = sweep(tmp_path / "toy", [(run_case(), broken_run()), (lengths_case(), broken_map())])
    made = make_report(results.folder, pdf=True)
    assert made.pdf == results.folder / "report.pdf"
    printed = made.pdf.read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page[^s]", printed))
    assert pages > 2
    sheets = re.findall(rb"/MediaBox\s*\[([^\]]*)\]", printed)
    assert {tuple(round(float(n)) for n in sheet.split()) for sheet in sheets} == {(0, 0, 595, 842)}  # A4, in points
    titles = re.findall(rb"/Title\s*\(([^)]*)\)", printed)
    assert b"A toy" in titles
    assert zlib.decompress(re.search(rb"stream\r?\n(.*?)endstream", printed, re.DOTALL)[1])  # type: ignore[index]


def test_the_command_ends_with_2_where_there_is_no_browser(
    stabilitykit: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sweep(tmp_path / "toy", [(run_case(), broken_run())]).folder
    monkeypatch.setenv("PATH", str(tmp_path))
    done = stabilitykit("report", str(folder), "--pdf")
    assert done.code == 2
    assert "looked for chromium, " in done.err
