"""Lines over layers, one for each dtype, and what they say under the pointer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stabilitykit.records import Record, Recording
from stabilitykit.report.blocks import Hover
from stabilitykit.report.parts import choose, places
from stabilitykit.report.style import dtype_style

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """`x` is the layer, or half-way to the next; `text` is the value with its place."""

    x: float
    y: float
    text: str


Panels = dict[str, dict[str, list[Point]]]
"""By the name of a panel and by dtype."""

RESIDUAL = "residual stream"


def panels(
    runs: Mapping[str, Recording], sublayers: Sequence[str], point: Callable[[float, Record], Point | None]
) -> Panels:
    """The residual stream and `sublayers`, a point a record, from before each run's first break."""
    found: Panels = {name: {} for name in (RESIDUAL, *sublayers)}
    for dtype, recording in runs.items():
        records = list(choose.intact(recording))
        halves = [places.at(records, label) for label in places.RESIDUAL]
        residual = [point(layer + turn / 2, r) for turn, half in enumerate(halves) for layer, r in half.items()]
        found[RESIDUAL][dtype] = sorted(filter(None, residual), key=lambda point: point.x)
        labels = places.sublayers(recording)
        for name in sublayers:
            at = sorted(places.at(records, labels[name]).items())
            found[name][dtype] = [made for layer, record in at if (made := point(layer, record)) is not None]
    return found


def plot(axes: "Axes", lines: Mapping[str, Sequence[Point]], *, joined: bool = True) -> None:
    """Draws each dtype's points; values that are no finite number leave a gap.

    Each line is thinner than the one before it, so that those beneath can be seen where lines coincide.
    """
    drawn = [(dtype, points) for dtype, points in lines.items() if points]
    for index, (dtype, points) in enumerate(drawn):
        heights = [point.y if math.isfinite(point.y) else math.nan for point in points]
        look = dtype_style(dtype) | ({} if joined else {"linestyle": "none"})
        width, size = max(2.6 - 0.7 * index, 0.8), max(5.5 - 1.2 * index, 2.0)
        axes.plot([point.x for point in points], heights, linewidth=width, markersize=size, label=dtype, **look)


def hovers(axes: "Axes", *lines: Mapping[str, Sequence[Point]], step: float = 1.0) -> list[Hover]:
    """A column of the axes for each x, with the value of every line there. To be asked for once limits are set."""
    texts: dict[float, list[str]] = {}
    for name, points in (item for part in lines for item in part.items()):
        for point in points:
            texts.setdefault(point.x, []).append(f"{name}: {point.text}")
    figure = axes.get_figure(root=True)
    assert figure is not None
    number = figure.axes.index(axes)
    bottom, top = axes.get_ylim()
    return [
        Hover(left=x - step / 2, right=x + step / 2, bottom=bottom, top=top, text="\n".join(said), axes=number)
        for x, said in sorted(texts.items())
    ]


def layer_axis(axes: "Axes", layers: int) -> None:
    """Ticks at whole layers, from 0."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.6, max(layers - 1, 0) + 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 3, 5, 6, 10], nbins=7))
    axes.set_xlabel("layer")


def legend(figure: "Figure") -> None:
    """One legend of all that is labelled in the figure, above it."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            handles=list(handles.values()), labels=list(handles), loc="outside upper right", ncols=len(handles)
        )
