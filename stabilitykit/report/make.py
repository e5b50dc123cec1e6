"""The report of a folder of results, from its records alone."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stabilitykit.commands import typed
from stabilitykit.formats import number_format
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Section
from stabilitykit.report.compare import compare
from stabilitykit.report.earlier import fingerprint
from stabilitykit.report.pdf import find_browser
from stabilitykit.report.sections import section, shown
from stabilitykit.report.write import write_report


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The page's path, and what it says; the path of its PDF, None where none was asked for."""

    page: Path
    sections: tuple[Section, ...]
    pdf: Path | None = None


@typed(None)  # a page is read by others than who typed this command
def make_report(
    folder: Path,
    *,
    against: Path | None = None,
    form: str | None = None,
    pdf: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Made:
    """Writes report.html, report.md, figures and tables of the sweep in `folder`; with `against`, what changed since.

    `form` is the number format to judge values by, the experiment's unless given. With `pdf` a browser prints the page
    to report.pdf. `progress` is called with (what, done, total). Raises MisuseError where a folder holds no sweep, for
    an unknown format, and where there is no browser; StabilityKitError where it fails.
    """
    browser = find_browser() if pdf else None
    with _uncollected():
        results = Results.open(folder)
        if form is not None:
            results.plan = replace(results.plan, format=number_format(form).name)
        names = shown(results)
        sections = []
        for done, name in enumerate(names):
            if progress is not None:
                progress("reading records", done, len(names))
            sections.append(section(results, name))
        if against is not None:
            sections.insert(1, compare(results, Results.open(against)))
        own_code = against is not None or results.plan.own_sections  # what else those read is not known
        made_from = None if own_code else fingerprint(folder, results.plan.format)
        page = write_report(
            results.plan.title, sections, folder, made_from=made_from, browser=browser, progress=progress
        )
    return Made(page=page, sections=tuple(sections), pdf=None if browser is None else page.with_suffix(".pdf"))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: records are many and stay, and looking through them takes as long as reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
