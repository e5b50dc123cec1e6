"""A table's cells as text for readers, and the whole of it as CSV for programs."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from stabilitykit.report.blocks import Cell, Column, Table
from stabilitykit.words import number

_T = TypeVar("_T")

SHORT = 40  # rows that a reader of plain text will scroll past; longer tables go on in their CSV file


def table(
    name: str,
    title: str,
    items: Iterable[_T],
    columns: Sequence[tuple[Column, Callable[[_T], Cell]]],
    *,
    note: str = "",
    alarming: Callable[[_T], bool] | None = None,
) -> Table:
    """A row for each item, a column for each pair of a heading and what it shows of the item."""
    items = list(items)
    return Table(
        name=name,
        title=title,
        columns=[column for column, _ in columns],
        rows=[[cell(item) for _, cell in columns] for item in items],
        note=note,
        alarming=frozenset(row for row, item in enumerate(items) if alarming is not None and alarming(item)),
    )


def some(value: float) -> str:
    """A column's format for counts of which most are zero: a dash for zero."""
    return f"{value:,.0f}" if value else "–"


def heading(column: Column) -> str:
    """The column's name, with its unit in brackets where it has one."""
    return f"{column.name} [{column.unit}]" if column.unit else column.name


def cell_text(cell: Cell, column: Column) -> str:
    """The cell for a reader: a dash for None, yes and no, numbers by the column's format; inf and NaN by name."""
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return cell
    if not math.isfinite(cell):
        return "NaN" if math.isnan(cell) else "inf" if cell > 0 else "-inf"
    if column.format is not None:
        return column.format(cell)
    return f"{cell:,}" if isinstance(cell, int) else number(cell)


def numeric_columns(table: Table) -> list[bool]:
    """Whether each column holds numbers and nothing else, None aside; at least one."""
    columns = [[row[index] for row in table.rows if row[index] is not None] for index in range(len(table.columns))]
    return [bool(cells) and all(_is_number(cell) for cell in cells) for cells in columns]


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def csv_text(table: Table) -> str:
    """Comma-separated values with a line of headings.

    Numbers have every digit that tells them apart, NaN and infinities are nan, inf and -inf, None is empty,
    booleans are true and false.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([heading(column) for column in table.columns])
    writer.writerows([[_csv_cell(cell) for cell in row] for row in table.rows])
    return out.getvalue()


def _csv_cell(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return repr(float(cell)) if isinstance(cell, float) else str(cell)
