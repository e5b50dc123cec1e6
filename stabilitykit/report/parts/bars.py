"""Horizontal bars made of parts, one below the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stabilitykit.report.blocks import Hover
from stabilitykit.report.style import PAPER, series_style

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of every bar: its `values`, one a bar; `colour` is a number for `series_style`, `hatch` matplotlib's."""

    name: str
    values: Sequence[float]
    colour: int
    hatch: str


def stacked_bars(
    figure: "matplotlib.figure.Figure", names: Sequence[str], parts: Sequence[Part], *, say: Callable[[float], str]
) -> "tuple[Axes, list[Hover]]":
    """Draws a bar for each of `names` from the top down; parts that are zero everywhere are left out.

    The axes get labels for a legend; `say` turns a value into words for its hover.
    """
    axes = figure.subplots()
    hovers: list[Hover] = []
    lefts = [0.0] * len(names)
    for part in parts:
        if not any(part.values):
            continue
        axes.barh(
            range(len(names)),
            part.values,
            left=lefts,
            height=0.6,
            label=part.name,
            color=series_style(part.colour)["color"],
            edgecolor=PAPER,
            hatch=part.hatch,
            linewidth=0.5,
        )
        rights = [left + value for left, value in zip(lefts, part.values, strict=True)]
        hovers += [
            Hover(
                left=left,
                right=right,
                bottom=level - 0.4,
                top=level + 0.4,
                text=f"{name}: {part.name} {say(right - left)}",
            )
            for level, (name, left, right) in enumerate(zip(names, lefts, rights, strict=True))
            if right > left
        ]
        lefts = rights
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return axes, hovers
