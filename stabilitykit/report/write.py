"""A report on disk: the page, the Markdown file, and every figure and table beside them.

FOLDER/
  report.html            self-contained
  report.pdf             where it was asked for
  report.md              links to the files below
  report.files.json      which of these files are the report's, and what figures were drawn from
  figures/NAME.svg .png
  tables/NAME.csv
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from stabilitykit.errors import MisuseError
from stabilitykit.files import write_bytes, write_text
from stabilitykit.report.blocks import Figure, Section, Table
from stabilitykit.report.earlier import NAME, PDF, Earlier
from stabilitykit.report.figures import draw_all, inline
from stabilitykit.report.html import html
from stabilitykit.report.markdown import markdown
from stabilitykit.report.pdf import print_page
from stabilitykit.report.tables import csv_text


def write_report(
    title: str,
    sections: Sequence[Section],
    folder: Path,
    *,
    made_from: str | None = None,
    browser: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Draws and writes everything, and returns the page's path.

    `made_from` stands for all that the figures are drawn from, their code too (`earlier.fingerprint`): those that an
    earlier report drew from the same stay. Each file is written aside and renamed. Figures, tables and a PDF that an
    earlier report in the folder left, and that this one does not have, are removed; no other file is. With a `browser`
    the page is printed to report.pdf. `progress` is called with (what, done, total).

    Raises ValueError for block names or section keys that are not unique, or unfit for a file's name; MisuseError
    where the folder cannot be written, the list of an earlier report's files cannot be read, or a file report.pdf is
    there that no report made; StabilityKitError where the browser makes no PDF.
    """
    blocks = [block for section in sections for block in section.blocks]
    figures = [block for block in blocks if isinstance(block, Figure)]
    tables = [block for block in blocks if isinstance(block, Table)]
    _check_names("name of a figure or table", [*(f.name for f in figures), *(t.name for t in tables)])
    _check_names("key of a section", [section.key for section in sections])

    files = {f"figures/{figure.name}.{kind}" for figure in figures for kind in ("svg", "png")}
    files |= {f"tables/{table.name}.csv" for table in tables}
    files |= set() if browser is None else {PDF}
    earlier = Earlier.open(folder)
    if browser is not None and PDF not in earlier.files and (folder / PDF).exists():
        raise MisuseError(f"{folder / PDF} is no report's: it would be overwritten. Move it elsewhere and try again.")
    kept = {}
    if made_from is not None and earlier.made_from == made_from:
        found = {figure.name: earlier.drawing(folder, figure.name) for figure in figures}
        kept = {name: drawing for name, drawing in found.items() if drawing is not None}
    # Both reports' files are listed while either may be there: one that is interrupted leaves no orphan.
    Earlier(files=earlier.files | files).write(folder)
    if PDF in earlier.files:
        (folder / PDF).unlink(missing_ok=True)  # it is not of the page that follows

    missing = [figure for figure in figures if figure.name not in kept]
    drawings = {figure.name: inline(figure, kept[figure.name].svg) for figure in figures if figure.name in kept}
    drawn = {path: digest for path, digest in earlier.drawn.items() if Path(path).stem in kept}
    for done, (figure, drawing) in enumerate(zip(missing, draw_all(missing), strict=True)):
        if progress is not None:
            progress("drawing figures", done, len(missing))
        for kind, content in (("svg", drawing.svg.encode()), ("png", drawing.png)):
            path = f"figures/{figure.name}.{kind}"
            write_bytes(folder / path, content)
            drawn[path] = hashlib.sha256(content).hexdigest()
        drawings[figure.name] = inline(figure, drawing.svg)
    if progress is not None and missing:
        progress("drawing figures", len(missing), len(missing))
    for table in tables:
        write_text(folder / f"tables/{table.name}.csv", csv_text(table))
    write_text(folder / "report.md", markdown(title, sections))
    write_text(folder / "report.html", html(title, sections, drawings))

    if browser is not None:
        if progress is not None:
            progress("printing", 0, 1)
        print_page(folder / "report.html", folder / PDF, browser)

    for stale in earlier.files - files:
        (folder / stale).unlink(missing_ok=True)
    Earlier(files=frozenset(files), made_from=made_from, drawn=drawn if made_from else {}).write(folder)
    return folder / "report.html"


def _check_names(what: str, names: Sequence[str]) -> None:
    unfit = [name for name in names if not NAME.fullmatch(name)]
    if unfit:
        raise ValueError(f"The {what} is made of letters, digits, - and _; {unfit[0]!r} is not.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"The {what} is unique in a report; {', '.join(twice)} came more than once.")
