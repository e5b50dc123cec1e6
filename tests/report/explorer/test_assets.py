"""What a page with an explorer carries beside its records."""

import base64
import gzip
import hashlib
from itertools import pairwise
from pathlib import Path

import pytest

from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Explorer, Section
from stabilitykit.report.explorer.assets import SCRIPT, UPLOT, asset, packed
from stabilitykit.report.explorer.classes import CLASSES, HeadroomClass
from stabilitykit.report.html import html
from stabilitykit.report.sections.explore import section

PACKAGE = Path(__file__).parents[3] / "stabilitykit" / "report" / "explorer"
VENDORED = [PACKAGE / UPLOT, Path(__file__).parents[1] / "vendor" / "axe-core-4.14.1"]


@pytest.mark.parametrize("folder", VENDORED, ids=lambda folder: folder.name)
def test_what_others_wrote_is_whole_and_has_its_version_and_licence(folder: Path) -> None:
    sums = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert {path.name for path in folder.iterdir()} == {*sums, "SHA256SUMS", "README.md"}
    assert "LICENSE" in sums
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    name, version = folder.name.rsplit("-", 1)
    (script,) = folder.glob("*.js")
    assert version in script.read_text(encoding="utf-8")[:100]
    assert (folder / "README.md").read_text().startswith(f"# {name} {version}\n")


def test_nothing_in_the_page_ends_a_script_before_its_end() -> None:
    folder = {path.stem for path in (PACKAGE / "script").iterdir()}
    assert folder == set(SCRIPT)
    for name in (*(f"script/{part}.js" for part in SCRIPT), f"{UPLOT}/uPlot.iife.min.js"):
        assert "</script" not in asset(name).lower()
        assert "<!--" not in asset(name)
    for name in ("explorer.css", f"{UPLOT}/uPlot.min.css"):
        assert "</style" not in asset(name).lower()


def test_records_are_packed_without_loss_the_same_each_time_and_as_no_markup(toy: Results) -> None:
    (found,) = section(toy).blocks
    assert isinstance(found, Explorer)
    document = found.document
    text = packed(document)
    assert gzip.decompress(base64.b64decode(text)).decode() == document
    assert text == packed(document)
    assert not set(text) & set("<>&'\"")


def test_only_a_page_with_an_explorer_carries_it_with_the_librarys_licence(toy: Results) -> None:
    without = html("T", [Section(key="s", title="S", opening="O.")], {})
    assert "uPlot" not in without
    page = html("T", [section(toy)], {})
    assert page.count("Permission is hereby granted, free of charge") == 1
    assert page.count('id="explorer-data"') == 1
    assert "<noscript>" in page
    assert "onerror" not in page


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.key)
def test_a_cells_number_can_be_read(found: HeadroomClass) -> None:
    for ground, ink in (found.light, found.dark):
        low, high = sorted((luminance(ground), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_less_headroom_stands_out_more(scheme: str) -> None:
    """By lightness alone, which everyone sees: the classes above the maximum are one ramp away from the page."""
    shades = [luminance(getattr(found, scheme)[0]) for found in CLASSES[1:]]
    assert shades == sorted(shades, reverse=scheme == "dark")
    steps = [(max(a, b) + 0.05) / (min(a, b) + 0.05) for a, b in pairwise(shades)]
    assert min(steps) > 1.1


def luminance(colour: str) -> float:
    """WCAG 2's, of #rrggbb."""
    srgb = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in srgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
