"""The report of a folder of results, from its records alone."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from stabilitykit.commands import typed
from stabilitykit.formats import number_format
from stabilitykit.records.sweep import Results
from stabilitykit.report.blocks import Section
from stabilitykit.report.compare import compare
from stabilitykit.report.sections import section, shown
from stabilitykit.report.write import write_report


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The page's path, and what it says."""

    page: Path
    sections: tuple[Section, ...]


@typed(None)  # a page is read by others than who typed this command
def make_report(
    folder: Path,
    *,
    against: Path | None = None,
    form: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Made:
    """Writes report.html, report.md, figures and tables of the sweep in `folder`; with `against`, what changed since.

    `form` is the number format to judge values by, the experiment's unless given. `progress` is called with (what,
    done, total). Raises MisuseError where a folder holds no sweep, and for an unknown format.
    """
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
    gc.freeze()  # the records, which are many and stay: looking for some to free takes as long as reading them
    page = write_report(results.plan.title, sections, folder, progress=progress)
    return Made(page=page, sections=tuple(sections))
