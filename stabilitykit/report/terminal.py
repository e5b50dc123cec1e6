"""Blocks on a terminal: prose and tables as they are, a figure by the name of its file."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from stabilitykit.report.blocks import Block, Explorer, Figure, Prose, Section, Table
from stabilitykit.report.prose import spans
from stabilitykit.report.tables import SHORT, cell_text, heading, numeric_columns

_WORD = 16  # characters of a word that is not broken

_TONES = {"plain": "", "good": "bold green", "bad": "bold red", "note": "dim"}


def print_section(section: Section, console: Console) -> None:
    """Prints the section. Tables longer than SHORT rows are cut, and say so with the name of their CSV file."""
    console.print(Text(section.title, style="bold underline"))
    console.print(_prose(section.opening, style="dim"))
    console.print()
    print_blocks(section.blocks, console)


def print_blocks(blocks: Iterable[Block], console: Console, *, rows: int = SHORT, whole: str = "") -> None:
    """Prints the blocks, an empty line after each but a table's note.

    Tables longer than `rows` are cut, and say that all of them are in `whole`: by default, their CSV file.
    """
    for block in blocks:
        match block:
            case Prose(text):
                console.print(_prose(text, style=_TONES[block.tone]))
            case Table():
                console.print(Text(block.title, style="bold"))
                console.print(_grid(block, rows, console.width))
                if block.note:
                    console.print(_prose(block.note, style="dim"))
                if len(block.rows) > rows:
                    where = whole or f"tables/{block.name}.csv"
                    cut = f"The first {rows} of {len(block.rows):,} rows; all are in {where}."
                    console.print(Text(cut, style="dim"))
            case Explorer():
                console.print(Text.assemble((block.title, "bold"), ": report.html"))
            case Figure():
                console.print(Text.assemble((block.title, "bold"), f": figures/{block.name}.svg"))
        console.print()


def _grid(table: Table, rows: int, width: int) -> Grid:
    """Numbers to the right, in columns that are never narrower than a number or a short word.

    Where `width` is too little, columns move together, numbers leave the room to text, and headings take more lines.
    """
    texts = [[cell_text(cell, column) for cell, column in zip(row, table.columns, strict=True)] for row in table.rows]
    headings = [heading(column) for column in table.columns]
    narrow = sum(max(map(len, cells)) + 2 for cells in zip(headings, *texts[:rows], strict=True)) > width
    grid = Grid(box=None, pad_edge=False, show_edge=False, collapse_padding=narrow)
    for index, (column, numeric) in enumerate(zip(table.columns, numeric_columns(table), strict=True)):
        cells = [row[index] for row in texts[:rows]]
        words = cells if numeric else [word for cell in cells for word in cell.split() if len(word) <= _WORD]
        least = max(map(len, [*headings[index].split(), *words]))
        grid.add_column(
            Text(headings[index]),
            justify="right" if numeric or column.format is not None else "left",
            overflow="fold",
            min_width=least,
            max_width=least if numeric and narrow else None,
        )
    for number, row in enumerate(texts[:rows]):
        grid.add_row(*map(Text, row), style="red" if number in table.alarming else None)
    return grid


def _prose(text: str, style: str = "") -> Text:
    parts = ((span.text, "bold" if span.bold else "cyan" if span.code else "") for span in spans(text))
    return Text.assemble(*parts, style=style)
