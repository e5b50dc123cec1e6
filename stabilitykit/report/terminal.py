"""A section on a terminal: prose and tables as they are, a figure by the name of its file."""

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from stabilitykit.report.blocks import Figure, Prose, Section, Table
from stabilitykit.report.prose import spans
from stabilitykit.report.tables import SHORT, cell_text, heading, numeric_columns


def print_section(section: Section, console: Console) -> None:
    """Prints the section. Tables longer than SHORT rows are cut, and say so with the name of their CSV file."""
    console.print(Text(section.title, style="bold underline"))
    console.print(_prose(section.opening, style="dim"))
    console.print()
    for block in section.blocks:
        match block:
            case Prose(text):
                console.print(_prose(text))
            case Table():
                console.print(_grid(block))
                if block.note:
                    console.print(_prose(block.note, style="dim"))
                if len(block.rows) > SHORT:
                    cut = f"The first {SHORT} of {len(block.rows):,} rows; all are in tables/{block.name}.csv."
                    console.print(Text(cut, style="dim"))
            case Figure():
                console.print(Text.assemble((block.title, "bold"), f": figures/{block.name}.svg"))
        console.print()


def _grid(table: Table) -> Grid:
    grid = Grid(
        title=Text(table.title), title_justify="left", title_style="bold", box=None, pad_edge=False, show_edge=False
    )
    for column, numeric in zip(table.columns, numeric_columns(table), strict=True):
        grid.add_column(Text(heading(column)), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows[:SHORT]:
        grid.add_row(*(Text(cell_text(cell, column)) for cell, column in zip(row, table.columns, strict=True)))
    return grid


def _prose(text: str, style: str = "") -> Text:
    parts = ((span.text, "bold" if span.bold else "cyan" if span.code else "") for span in spans(text))
    return Text.assemble(*parts, style=style)
