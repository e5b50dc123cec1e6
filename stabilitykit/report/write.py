"""A report on disk: the page, the Markdown file, and every figure and table beside them.

FOLDER/
  report.html            self-contained
  report.md              links to the files below
  report.files.json      the files of figures/ and tables/ that belong to the report
  figures/NAME.svg .png
  tables/NAME.csv
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from stabilitykit.errors import MisuseError
from stabilitykit.files import write_bytes, write_json, write_text
from stabilitykit.report.blocks import Figure, Section, Table
from stabilitykit.report.figures import draw_all
from stabilitykit.report.html import html
from stabilitykit.report.markdown import markdown
from stabilitykit.report.tables import csv_text

_MANIFEST = "report.files.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_OURS = re.compile(rf"figures/{_NAME.pattern}\.(svg|png)|tables/{_NAME.pattern}\.csv")


def write_report(
    title: str,
    sections: Sequence[Section],
    folder: Path,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Draws and writes everything, and returns the page's path.

    Each file is written aside and renamed. Figures and tables that an earlier report in the folder left, and that
    this one does not have, are removed; no other file is. `progress` is called with (what, done, total).

    Raises ValueError for block names or section keys that are not unique, or unfit for a file's name; MisuseError
    where the folder cannot be written or the list of an earlier report's files cannot be read.
    """
    blocks = [block for section in sections for block in section.blocks]
    figures = [block for block in blocks if isinstance(block, Figure)]
    tables = [block for block in blocks if isinstance(block, Table)]
    _check_names("name of a figure or table", [*(f.name for f in figures), *(t.name for t in tables)])
    _check_names("key of a section", [section.key for section in sections])

    files = {f"figures/{figure.name}.{kind}" for figure in figures for kind in ("svg", "png")}
    files |= {f"tables/{table.name}.csv" for table in tables}
    earlier = _files_of_earlier(folder)
    # Both reports' files are listed while either may be there: one that is interrupted leaves no orphan.
    write_json(folder / _MANIFEST, sorted(files | earlier))

    drawings: dict[str, str] = {}
    for done, (figure, drawing) in enumerate(zip(figures, draw_all(figures), strict=True)):
        if progress is not None:
            progress("drawing figures", done, len(figures))
        write_text(folder / f"figures/{figure.name}.svg", drawing.svg)
        write_bytes(folder / f"figures/{figure.name}.png", drawing.png)
        drawings[figure.name] = drawing.inline
    if progress is not None and figures:
        progress("drawing figures", len(figures), len(figures))
    for table in tables:
        write_text(folder / f"tables/{table.name}.csv", csv_text(table))
    write_text(folder / "report.md", markdown(title, sections))
    write_text(folder / "report.html", html(title, sections, drawings))

    for stale in earlier - files:
        (folder / stale).unlink(missing_ok=True)
    write_json(folder / _MANIFEST, sorted(files))
    return folder / "report.html"


def _check_names(what: str, names: Sequence[str]) -> None:
    unfit = [name for name in names if not _NAME.fullmatch(name)]
    if unfit:
        raise ValueError(f"The {what} is made of letters, digits, - and _; {unfit[0]!r} is not.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"The {what} is unique in a report; {', '.join(twice)} came more than once.")


def _files_of_earlier(folder: Path) -> set[str]:
    path = folder / _MANIFEST
    if not path.exists():
        return set()
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        listed = None
    if not isinstance(listed, list) or not all(isinstance(name, str) and _OURS.fullmatch(name) for name in listed):
        raise MisuseError(f"{path} lists a report's figures and tables; this one does not. Delete it and try again.")
    return set(listed)
