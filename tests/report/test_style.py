import itertools
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas

from stabilitykit.errors import MisuseError
from stabilitykit.formats import FORMATS
from stabilitykit.report import style
from stabilitykit.report.style import dtype_style, heat_map, limit_line, report_style, series_style
from stabilitykit.words import grouped

# How linear sRGB looks without one kind of cone: Machado, Oliveira and Fernandes (2009), severity 1.
SIGHT = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour: str, sight: str) -> np.ndarray:
    """CIE L*a*b* under D65."""
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(SIGHT[sight] @ linear, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(a: str, b: str, sight: str) -> float:
    return float(np.linalg.norm(lab(a, sight) - lab(b, sight)))


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_used_together_can_be_told_apart(sight: str) -> None:
    """2.3 is the least difference that is noticed side by side; thin lines apart from each other need far more."""
    together = [dtype_style(name)["color"] for name in ("float32", "float16", "bfloat16", "float8_e4m3fn")]
    series = [series_style(index)["color"] for index in range(4)]
    for a, b in (*itertools.combinations(together, 2), *itertools.combinations(series, 2)):
        assert distance(a, b, sight) > 35, (a, b)


def test_the_measure_tells_a_bad_pair() -> None:
    """Orange and vermillion: well apart for no one, worst without green cones."""
    assert distance(style.ORANGE, style.VERMILLION, "deuteranopia") < 20 < distance(style.ORANGE, style.GREEN, "full")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_line_of_its_own(name: str) -> None:
    others = [dtype_style(other) for other in FORMATS if other != name]
    for part in ("color", "linestyle", "marker"):
        assert dtype_style(name)[part] not in [other[part] for other in others]


def test_a_dtype_is_known_by_torchs_name_and_no_other() -> None:
    assert dtype_style("torch.float16") == dtype_style("float16")
    with pytest.raises(MisuseError, match="Unknown number format 'int8'; choose one of: "):
        dtype_style("int8")


def test_series_do_not_repeat_before_the_colours_have_come_twice() -> None:
    looks = [(look["color"], look["linestyle"], look["marker"]) for look in map(series_style, range(14))]
    assert len(set(looks)) == 14


@pytest.mark.parametrize("along", ["x", "y"])
def test_a_limit_line_is_at_the_formats_largest_value(along: str) -> None:
    with report_style():
        axes = Canvas().add_subplot()
        limit_line(axes, "float16", along=along)  # type: ignore[arg-type]
        limit_line(axes, "float8_e4m3fn", along=along, exponent=True)  # type: ignore[arg-type]
    places = [set(np.asarray(line.get_ydata() if along == "y" else line.get_xdata())) for line in axes.lines]
    assert places == [{65504.0}, {np.log2(448)}]
    assert [text.get_text() for text in axes.texts] == ["float16 maximum, 65,504", "float8_e4m3fn maximum, 448"]


def test_a_heat_map_marks_broken_missing_and_past_the_limit(headroom: np.ndarray) -> None:
    with report_style():
        axes = Canvas().add_subplot()
        hovers = heat_map(
            axes, headroom, rows="ab", columns="xyz", label="bits", limit=0, hover=lambda r, c: f"{r} {c}"
        )
    marked = {(patch.get_hatch(), patch.get_xy(), patch.get_width()) for patch in axes.patches}  # type: ignore[attr-defined]
    assert marked == {("xxx", (1.5, 0.5), 1), (None, (1.5, -0.5), 1), ("////", (0.5, -0.5), 1)}
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["broken: inf or NaN", "not recorded", "below 0"]
    assert [(h.left, h.right, h.bottom, h.top, h.text) for h in hovers[:2]] == [
        (-0.5, 0.5, -0.5, 0.5, "0 0"),
        (0.5, 1.5, -0.5, 0.5, "0 1"),
    ]
    assert len(hovers) == 6


def test_neighbours_that_say_the_same_are_one_rectangle() -> None:
    with report_style():
        hovers = heat_map(
            Canvas().add_subplot(), [[1, 1, 2]], rows="a", columns="xyz", label="", hover=lambda _, c: "xxz"[c]
        )
    assert [(h.left, h.right, h.text) for h in hovers] == [(-0.5, 1.5, "x"), (1.5, 2.5, "z")]


@pytest.mark.parametrize("values", [[[np.nan]], [[-np.inf, np.inf]], [[2.0, 2.0]]])
def test_a_map_without_two_different_numbers_is_drawn(values: list[list[float]]) -> None:
    columns = "xy"[: len(values[0])]
    with report_style():
        canvas = Canvas()
        heat_map(canvas.add_subplot(), values, rows="a", columns=columns, label="", hover=lambda _, c: str(c))
        canvas.draw_without_rendering()


def test_numbers_are_written_for_readers() -> None:
    assert [style.bits(value) for value in (-0.063, 0.5, 12.34)] == ["-0.06", "0.50", "12.3"]
    assert [style.share(value) for value in (0, 0.965, 0.00004, 1)] == ["0.0%", "96.5%", "0.004%", "100.0%"]
    assert [style.size(value) for value in (0, 512, 1536, 536_000_000, 2**30, 2**50)] == [
        "0 B",
        "512 B",
        "1.50 KiB",
        "511 MiB",
        "1.00 GiB",
        "1024 TiB",
    ]
    assert (grouped(12345.0), style.decibel(46.17)) == ("12,345", "46.2")


def test_blocks_and_style_do_not_load_matplotlib_until_something_is_drawn() -> None:
    code = (
        "import sys, stabilitykit.report.blocks, stabilitykit.report.style, stabilitykit.report.write;"
        "assert not {'matplotlib', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
