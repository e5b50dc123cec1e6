"""A figure as files for print, and as part of a page.

The files are black on opaque white. In the page the drawing is transparent, its ink is the page's own, its text is
text, and the parts that a figure names say what they are under the pointer. The same figure gives the same bytes.
"""

import io
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from stabilitykit.report.blocks import Figure, Hover
from stabilitykit.report.style import FAINT, INK, PAPER, report_style

if TYPE_CHECKING:
    import matplotlib.figure

# Points per inch of an SVG, which is also what its user units are.
_POINTS = 72

_DECLARATION = '<?xml version="1.0" encoding="utf-8"?>\n'
_FILE_FONTS = "'DejaVu Sans', Verdana, sans-serif"
_PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--faint)", PAPER: "var(--paper)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One figure, drawn: the content of its two files."""

    svg: str
    png: bytes


def draw_all(blocks: Sequence[Figure]) -> Iterator[Drawing]:
    """Draws the figures in their order, on Linux in a process for each core.

    Such a process is a copy of this one, made in no time; elsewhere it would start anew and read the records again.
    """
    workers = min(len(blocks), os.cpu_count() or 1)
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        yield from map(draw, blocks)
        return
    with multiprocessing.get_context("fork").Pool(workers, _begin, (blocks,)) as pool:
        yield from pool.imap(_draw_number, range(len(blocks)))


_blocks: Sequence[Figure] = ()  # of a drawing process


def _begin(blocks: Sequence[Figure]) -> None:
    global _blocks
    _blocks = blocks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked for drawings ends this one


def _draw_number(number: int) -> Drawing:
    return draw(_blocks[number])


def draw(block: Figure) -> Drawing:
    """Draws the figure, lays it out once, and saves it for each use."""
    from matplotlib.figure import Figure as Canvas

    with report_style(**{"svg.hashsalt": block.name}):
        canvas = Canvas(figsize=block.size)
        hovers = block.draw(canvas)
        png = _png(canvas)
        # The layout engine moves axes at every drawing; frozen, hover rectangles and both files agree.
        canvas.set_layout_engine("none")
        return Drawing(svg=_standalone(block, _svg(canvas), _rectangles(canvas, hovers)), png=png)


# `savefig` would draw the whole figure twice for each file.


def _png(canvas: "matplotlib.figure.Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    FigureCanvasAgg(canvas).print_png(out, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return out.getvalue()


def _svg(canvas: "matplotlib.figure.Figure") -> str:
    """The `<svg>` element with no metadata: its date and version differ from one run to the next."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    FigureCanvasSVG(canvas).print_svg(out)  # type: ignore[no-untyped-call]
    text = out.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.strip()


def _standalone(block: Figure, svg: str, rectangles: str) -> str:
    described = f"<title>{escape(block.title)}</title>\n <desc>{escape(block.alt)}</desc>"
    svg = re.sub(r"(<svg[^>]*>)", lambda match: f"{match[1]}\n {described}", svg, count=1)
    svg = svg.replace("'DejaVu Sans'", _FILE_FONTS)
    return f"{_DECLARATION}{svg.removesuffix('</svg>')}{rectangles}</svg>\n"


def inline(block: Figure, svg: str) -> str:
    """The figure as an SVG element of a page, made from the text of its SVG file."""
    svg = svg.removeprefix(_DECLARATION).strip()
    # The page's element has a label; and a page has one name space for ids and for style rules.
    svg = re.sub(r"\s*<title>.*?</title>\s*<desc>.*?</desc>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<style\b.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("fill: #ffffff", "fill: none", 1)  # the ground, which comes first
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{block.name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{block.name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{block.name}-\1)", svg)
    for drawn, page in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, page)
    svg = svg.replace(_FILE_FONTS, "system-ui, sans-serif")
    width, height = (size * _POINTS for size in block.size)
    opening = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}pt" role="img" aria-label="{escape(block.alt)}">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)


def _rectangles(canvas: "matplotlib.figure.Figure", hovers: Sequence[Hover]) -> str:
    """Invisible rectangles with titles, in the SVG's coordinates, each cut to its axes."""
    if not hovers:
        return ""
    width, height = canvas.get_size_inches() * _POINTS
    to_figure = canvas.transFigure.inverted()
    lines = []
    for hover in hovers:
        axes = canvas.axes[hover.axes]
        box = axes.get_position(original=False)
        corners = (axes.transData + to_figure).transform([(hover.left, hover.bottom), (hover.right, hover.top)])
        (left, right), (bottom, top) = sorted(corners[:, 0]), sorted(corners[:, 1])
        left, right = max(left, box.x0) * width, min(right, box.x1) * width
        bottom, top = max(bottom, box.y0) * height, min(top, box.y1) * height
        if left < right and bottom < top:
            lines.append(
                f'<rect x="{left:.2f}" y="{height - top:.2f}" width="{right - left:.2f}" height="{top - bottom:.2f}">'
                f"<title>{escape(hover.text)}</title></rect>"
            )
    return '<g class="hover" fill="none" pointer-events="all">\n' + "\n".join(lines) + "\n</g>\n"
