"""A small report with a block of every kind."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas

from stabilitykit.report.blocks import Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.style import bits, dtype_style, heat_map, limit_line, magnitude_axis

HEADROOM = [[3.0, -0.5, math.nan], [math.inf, 1.25, -math.inf]]


def draw_lines(canvas: Canvas) -> list[Hover]:
    axes = canvas.add_subplot()
    for dtype in ("float32", "float16", "bfloat16"):
        axes.plot([0, 1, 2], [100, 9_000, 90_000], label=dtype, **dtype_style(dtype))
    magnitude_axis(axes)
    limit_line(axes, "float16")
    axes.set(xlabel="layer", ylabel="amax", ylim=(10, 1e6))
    axes.legend()
    return []


def draw_map(canvas: Canvas) -> list[Hover]:
    return heat_map(
        canvas.add_subplot(),
        HEADROOM,
        rows=["q_proj", "<add.1>"],
        columns=["0", "1", "2"],
        label="headroom in bits",
        limit=0,
        hover=lambda row, column: f"layer {column}: {HEADROOM[row][column]} & more",
    )


LINES = Figure(name="peaks", title="Peaks", caption="Of `<bos>`.", alt='rising "lines"', draw=draw_lines, size=(6, 3))
MAP = Figure(name="map", title="Layer × site", caption="Dark is near.", alt="a heat map", draw=draw_map, size=(6, 3))

MIXED = Table(
    name="mixed",
    title="Lengths",
    columns=[
        Column(name="text"),
        Column(name="length", unit="tokens"),
        Column(name="headroom", unit="bits", format=bits),
        Column(name="clean"),
    ],
    rows=[
        ("a|b", 1000, 0.25, True),
        ("<bos>", 12, None, False),
        (None, 7, -3.0, None),
        ("*two*\nlines", 12, math.nan, True),
        ("_x_ float8_e4m3fn", 300, math.inf, True),
    ],
    note="See `layers.7/add.1`.",
)


@pytest.fixture(scope="session")
def sections() -> list[Section]:
    return [
        Section(
            key="verdict", title="Verdict", opening="What was found.", blocks=[Prose("**float16** breaks at `<bos>`.")]
        ),
        Section(key="lengths", title="Length × dtype", opening="A length is no cause.", blocks=[MIXED, LINES]),
        Section(key="heat", title="Headroom", opening="Bits.", blocks=[MAP]),
        Section(key="softmax", title="Softmax", opening="Nothing was recorded."),
    ]


@pytest.fixture(scope="session")
def long_table() -> Table:
    return Table(
        name="long",
        title="Long",
        columns=[Column(name="n"), Column(name="2n")],
        rows=[(n, 2 * n) for n in range(1, 61)],
    )


@pytest.fixture
def lines() -> Figure:
    return LINES


@pytest.fixture
def heat() -> Figure:
    return MAP


@pytest.fixture
def mixed() -> Table:
    return MIXED


@pytest.fixture
def headroom() -> np.ndarray:
    return np.array(HEADROOM)
