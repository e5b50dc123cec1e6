"""What a section of a report is made of: prose, tables and figures, before anything is drawn.

A section is a function of a sweep's results; Markdown, HTML, CSV and the terminal draw the blocks it returns.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import matplotlib.figure

Cell = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Prose:
    """A paragraph. `code` between backticks, **bold** between pairs of stars; nothing else is markup.

    A terminal shows a `tone`: green for good, red for bad, dim for a note on what is shown.
    """

    text: str
    _: KW_ONLY
    tone: Literal["plain", "good", "bad", "note"] = "plain"


@dataclass(frozen=True, slots=True)
class Column:
    """A column's heading, its unit (bits, tokens, bytes, dB; empty for none) and how its numbers are written.

    `format` turns a number into text for readers; files and sorting get the number itself.
    """

    name: str
    _: KW_ONLY
    unit: str = ""
    format: Callable[[float], str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under columns. `name` is the CSV file's, unique in a report. A cell that is None is shown as a dash.

    `alarming` are the numbers of the rows, from 0, in which something overflows or is lost: red on a terminal.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    alarming: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hover:
    """What a rectangle of a figure says under the pointer; corners in the axes' data coordinates.

    `axes` is the number of the axes in the figure.
    """

    left: float
    right: float
    bottom: float
    top: float
    text: str
    axes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawing. `name` is that of its SVG and PNG files, unique in a report.

    `draw` fills an empty matplotlib figure of `size` inches, in the report's style, and returns what its parts
    say on hover. `alt` says in words what can be seen, for those who cannot.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: "Callable[[matplotlib.figure.Figure], Sequence[Hover]]"
    size: tuple[float, float] = (8.0, 4.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explorer:
    """Every record at a click, at most one in a report; only a page can show it. `document` is what it reads, JSON."""

    title: str
    document: str


Block = Prose | Table | Figure | Explorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A titled part of a report. `opening` says what is shown and where it misleads.

    `key` is its anchor, and its name in an experiment file. Without blocks, `opening` says what is missing.
    """

    key: str
    title: str
    opening: str
    blocks: Sequence[Block] = field(default=())
