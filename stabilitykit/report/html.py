"""A report as one self-contained page: no script, style, font or image comes from anywhere else."""

import base64
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache

import jinja2
import markupsafe

from stabilitykit.report.blocks import Cell, Explorer, Section, Table
from stabilitykit.report.explorer import assets
from stabilitykit.report.prose import spans
from stabilitykit.report.tables import cell_text, csv_text, heading, numeric_columns

_LONG = 36  # characters of a cell that stands on one line


def html(title: str, sections: Sequence[Section], drawings: Mapping[str, str]) -> str:
    """The page. `drawings` holds the inline SVG of each figure by its name. The first section is the verdict's panel.

    Tables carry their CSV in themselves, so the page can be forwarded alone.
    """
    explorer = next((block for s in sections for block in s.blocks if isinstance(block, Explorer)), None)
    return _template().render(title=title, sections=sections, drawings=drawings, explorer=explorer)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stabilitykit.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"spans": spans, "heading": heading, "sort_key": _sort_key, "csv_link": _csv_link}
    environment.filters |= {"css_string": _css_string, "breakable": _breakable}
    environment.globals |= {"cell_text": cell_text, "numeric_columns": numeric_columns, "long_columns": _long_columns}
    assets.register(environment)
    environment.tests["of_kind"] = lambda block, kind: type(block).__name__ == kind
    return environment.get_template("page.html.jinja")


def _sort_key(cell: Cell) -> str | None:
    """A number as JavaScript reads it, empty for cells that go last; None where a cell is sorted by its text."""
    if cell is None:
        return ""
    if isinstance(cell, str):
        return None
    return "" if math.isnan(cell) else repr(float(cell)).replace("inf", "Infinity")


def _long_columns(table: Table) -> list[bool]:
    """Whether a cell of each column is so long that it is better broken into lines."""
    return [
        any(len(cell_text(row[index], column)) > _LONG for row in table.rows)
        for index, column in enumerate(table.columns)
    ]


def _breakable(text: str) -> markupsafe.Markup:
    """A line may end after a dot or a slash inside a word, as sites have them."""
    return markupsafe.Markup(re.sub(r"(?<=\w)([./])(?=\w)", r"\1<wbr>", str(markupsafe.escape(text))))


def _css_string(text: str) -> markupsafe.Markup:
    """Text as a string of a style sheet; whatever could end it or the sheet is written by its number."""
    return markupsafe.Markup('"' + "".join(c if c.isalnum() or c in " []" else f"\\{ord(c):x} " for c in text) + '"')


def _csv_link(table: Table) -> str:
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(csv_text(table).encode()).decode()
