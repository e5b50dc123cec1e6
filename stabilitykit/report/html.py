"""A report as one self-contained page: no script, style, font or image comes from anywhere else."""

import base64
import math
from collections.abc import Mapping, Sequence
from functools import cache

import jinja2

from stabilitykit.report.blocks import Cell, Explorer, Section, Table
from stabilitykit.report.explorer import assets
from stabilitykit.report.prose import spans
from stabilitykit.report.tables import cell_text, csv_text, heading, numeric_columns


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
    environment.globals |= {"cell_text": cell_text, "numeric_columns": numeric_columns}
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


def _csv_link(table: Table) -> str:
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(csv_text(table).encode()).decode()
