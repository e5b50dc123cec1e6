"""A table's cells as text for readers, and the whole of it as CSV for programs."""

import csv
import io
import math

from stabilitykit.report.blocks import Cell, Column, Table
from stabilitykit.words import number

SHORT = 40  # rows that a reader of plain text will scroll past; longer tables go on in their CSV file


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
