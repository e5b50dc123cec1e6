"""How a report's figures look: colours, lines and marks that survive a printer, a dark page and colour-blind eyes.

Colours are those of Okabe and Ito, "Color Universal Design" (2008, https://jfly.uni-koeln.de/color/). Whatever is told
apart by colour also differs by line and marker. Everything draws on a `matplotlib.figure.Figure`; pyplot and its global
state are not touched.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, groupby
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from stabilitykit.formats import FORMATS, number_format
from stabilitykit.report.blocks import Hover
from stabilitykit.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_T = TypeVar("_T")

# Written into the drawing as ordinary colours; a page replaces them by its own, so that ink is light on a dark page.
INK = "#1a1b1c"  # text, axes, the reference run
FAINT = "#d0d1d2"  # grids, empty cells
PAPER = "#fdfefe"  # what is behind text

ORANGE, SKY, GREEN, BLUE = "#e69f00", "#56b4e9", "#009e73", "#0072b2"
VERMILLION, PURPLE = "#d55e00", "#cc79a7"  # yellow is left out: it cannot be seen on white

# Marks of a heat map's cells, as keyword arguments of a patch. Hatches keep their colour on a dark page: so do cells.
BROKEN: dict[str, Any] = {"facecolor": VERMILLION, "hatch": "xxx"}
PAST_LIMIT: dict[str, Any] = {"facecolor": "none", "edgecolor": "#ffffff", "hatch": "////"}
UNKNOWN: dict[str, Any] = {"facecolor": FAINT, "edgecolor": FAINT}

# Behind text that lines may cross: `axes.text(..., bbox=BACKING)`. Path effects would turn an SVG's text into outlines.
BACKING: dict[str, Any] = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 1}

HEADROOM = "cividis"  # little headroom is dark, much is light; made for colour-blind eyes (Nuñez et al., 2018)


# One for each format, in the registry's order; each differs from the others in all three.
_LOOKS: tuple[tuple[str, Any, str], ...] = (
    (PURPLE, (0, (7, 2)), "P"),  # float64
    (INK, "-", "o"),
    (BLUE, "-.", "^"),
    (VERMILLION, "--", "s"),
    (SKY, (0, (5, 1, 1, 1, 1, 1)), "v"),
    (GREEN, ":", "D"),  # float8_e4m3fn
    (ORANGE, (0, (3, 1, 1, 1)), "X"),
)
_DTYPES = dict(zip(FORMATS, cycle(_LOOKS), strict=False))

# The first four can be told apart by colour alone by everyone; past them line and marker help.
_SERIES: tuple[tuple[str, Any, str], ...] = (
    (BLUE, "-", "o"),
    (VERMILLION, "--", "s"),
    (GREEN, "-.", "^"),
    (INK, ":", "D"),
    (SKY, (0, (5, 1, 1, 1, 1, 1)), "v"),
    (ORANGE, (0, (7, 2)), "P"),
    (PURPLE, (0, (3, 1, 1, 1)), "X"),
)

_RC: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.color": INK,
    "ytick.labelsize": 8,
}


@contextmanager
def report_style(**more: Any) -> Iterator[None]:
    """Matplotlib in the report's style, whatever the user's own is; `more` settings on top. Restored at the end."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC | more)  # type: ignore[arg-type]
        yield


def dtype_style(dtype: str) -> dict[str, Any]:
    """Keyword arguments of `axes.plot` for a dtype's line: the same in every figure.

    Number formats that have no look of their own get one by their turn in FORMATS. Raises MisuseError for a dtype that
    is no number format.
    """
    name = number_format(dtype).name
    return _line(_DTYPES[name]) if name in _DTYPES else series_style(len(_SERIES) + list(FORMATS).index(name))


def series_style(index: int) -> dict[str, Any]:
    """Keyword arguments of `axes.plot` for the line number `index` (from 0) of things that are no dtypes.

    From the eighth on colours come again, with other lines.
    """
    turn, place = divmod(index, len(_SERIES))
    colour, _, marker = _SERIES[place]
    return _line((colour, _SERIES[(place + 3 * turn) % len(_SERIES)][1], marker))


def _line(style: tuple[str, Any, str]) -> dict[str, Any]:
    colour, line, marker = style
    return {"color": colour, "linestyle": line, "marker": marker}


def limit_line(
    axes: "Axes", format_name: str, *, along: Literal["x", "y"] = "y", exponent: bool = False, in_legend: bool = False
) -> None:
    """Draws and labels a format's largest finite value on the `along` axis, or with `exponent` its log2.

    The label stands at the line, or with `in_legend` in the legend, where panels are too small for it.
    """
    form = number_format(format_name)
    where = math.log2(form.largest) if exponent else form.largest
    draw = axes.axhline if along == "y" else axes.axvline
    text = f"{form.name} maximum, {number(form.largest)}"
    line = draw(where, color=dtype_style(form.name)["color"], linewidth=1.0, linestyle=(0, (1, 1.5)), zorder=1.5)
    if in_legend:
        line.set_label(text)
        return
    axes.annotate(
        text,
        xy=(0, where) if along == "y" else (where, 1),
        xycoords=("axes fraction", "data") if along == "y" else ("data", "axes fraction"),
        xytext=(4, 3) if along == "y" else (-3, -4),
        textcoords="offset points",
        ha="left" if along == "y" else "right",
        va="bottom" if along == "y" else "top",
        rotation=0 if along == "y" else 90,
        fontsize=7.5,
        bbox=BACKING,
    )


def magnitude_axis(axes: "Axes", along: Literal["x", "y"] = "y") -> None:
    """Makes an axis logarithmic, with powers of ten as ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    (axes.set_yscale if along == "y" else axes.set_xscale)("log")
    axis = axes.yaxis if along == "y" else axes.xaxis
    axis.set_major_locator(LogLocator(base=10, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"10{str(round(math.log10(value))).translate(_RAISED)}"))
    axis.set_minor_locator(NullLocator())


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def heat_map(
    axes: "Axes",
    values: npt.ArrayLike,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    hover: Callable[[int, int], str],
    limit: float | None = None,
    colours: str = HEADROOM,
    axes_number: int = 0,
) -> list[Hover]:
    """Draws `values`, one cell a number, with a colour bar called `label`; the first row is at the bottom.

    A cell of -inf is broken, one of NaN was not recorded, +inf has the scale's last colour; finite cells below
    `limit` are hatched. The marks that occur are explained above the map. Axes get as many of the names in `rows`
    (one for each row) and `columns` as fit. Returns `hover(row, column)` for every cell, neighbours in a row that say
    the same as one; `axes_number` is that of the axes in the figure.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    grid = np.asarray(values, dtype=float)
    finite = grid[np.isfinite(grid)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    shown = np.ma.masked_array(np.where(grid == np.inf, high, grid), ~(np.isfinite(grid) | (grid == np.inf)))
    image = axes.imshow(shown, cmap=colours, vmin=low, vmax=high, origin="lower", aspect="auto", interpolation="none")
    bar = figure.colorbar(image, ax=axes, label=label, pad=0.02, extend="max" if np.isposinf(grid).any() else None)
    bar.outline.set_visible(False)
    if limit is not None and low < limit < high:
        bar.ax.axhline(limit, color=PAPER, linewidth=1.5)
        bar.ax.axhline(limit, color=INK, linewidth=1.5, linestyle=(0, (2, 2)))

    marks: list[tuple[str, npt.NDArray[np.bool_], dict[str, Any]]] = [
        ("broken: inf or NaN", np.isneginf(grid), BROKEN),
        ("not recorded", np.isnan(grid), UNKNOWN),
    ]
    if limit is not None:
        marks.append((f"below {limit:g}", np.isfinite(grid) & (grid < limit), PAST_LIMIT))
    _mark(axes, [mark for mark in marks if mark[1].any()], dark=image.cmap(0.0))

    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    _name(axes.xaxis, columns, most=int(figure.get_figwidth() * 2.2))
    _name(axes.yaxis, rows, most=int(figure.get_figheight() * 4.5))
    if max(map(len, columns), default=0) > 6:
        for text in axes.get_xticklabels():
            text.set(rotation=40, ha="right", rotation_mode="anchor")
    return [
        Hover(left=first - 0.5, right=last + 0.5, bottom=row - 0.5, top=row + 0.5, text=text, axes=axes_number)
        for row in range(grid.shape[0])
        for first, last, text in _runs([hover(row, column) for column in range(grid.shape[1])])
    ]


def _mark(axes: "Axes", marks: Sequence[tuple[str, npt.NDArray[np.bool_], dict[str, Any]]], dark: Any) -> None:
    """`dark` is the colour of the lowest cells, on which the legend shows a hatch without a colour of its own."""
    from matplotlib.patches import Patch, Rectangle

    for _, cells, look in marks:
        for row, line in enumerate(cells):
            for first, last, marked in _runs(line.tolist()):
                if marked:
                    axes.add_patch(Rectangle((first - 0.5, row - 0.5), last - first + 1, 1, linewidth=0, **look))
    if marks:
        handles = [
            Patch(label=text, linewidth=0, **(look | {"facecolor": dark} if look["facecolor"] == "none" else look))
            for text, _, look in marks
        ]
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), borderaxespad=0.2)


def _runs(values: Sequence[_T]) -> Iterator[tuple[int, int, _T]]:
    """First index, last index and value of each stretch of equal neighbours."""
    for value, group in groupby(range(len(values)), key=lambda index: values[index]):
        places = list(group)
        yield places[0], places[-1], value


def _name(axis: "Axis", names: Sequence[str], most: int) -> None:
    step = max(1, math.ceil(len(names) / max(most, 1)))
    places = range(0, len(names), step)
    axis.set_ticks(list(places), [names[place] for place in places])
    axis.set_tick_params(length=0)


def bits(value: float) -> str:
    """Headroom: -0.1, with a sign that shows which side of the limit; two decimals near it."""
    return f"{value:.2f}" if abs(value) < 1 else f"{value:.1f}"


def decibel(value: float) -> str:
    """46.2"""
    return f"{value:.1f}"


def share(value: float) -> str:
    """A fraction in percent, with the digits that keep a small one from being 0: 96.5% · 0.004% · 0.0%."""
    percent = 100 * value
    return f"{percent:.1f}%" if percent == 0 or abs(percent) >= 1 else f"{percent:.2g}%"


def size(value: float) -> str:
    """Bytes in binary units: 512 B · 1.5 KiB · 511 MiB · 1.00 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000 or unit == "TiB":
            digits = 0 if unit == "B" or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
            return f"{value:.{digits}f} {unit}"
        value /= 1024
    raise AssertionError
