"""Memory in bytes, and the dtype that the findings lead to."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from swept import broken_run, clean_run, memory, memory_case, run_case, sweep

from stabilitykit.report.blocks import Figure, Prose, Section, Table
from stabilitykit.report.sections.memory import section


def made(folder: Path, *pairs: Any) -> Section:
    return section(sweep(folder / "toy", pairs))


def tables(found: Section) -> dict[str, Table]:
    return {block.name: block for block in found.blocks if isinstance(block, Table)}


def choice(found: Section) -> dict[Any, tuple[Any, Any]]:
    return {row[0]: (row[1], row[3]) for row in tables(found)["dtype-to-choose"].rows}


def test_computed_and_measured_stand_side_by_side_with_the_libraries_apart(tmp_path: Path) -> None:
    found = made(tmp_path, (memory_case(), memory(measured=1250)), (memory_case(length=512), None))
    assert [list(row) for row in tables(found)["memory"].rows] == [
        ["float16", 128, "cpu", "the model", 800, 100, 100, 1000, 1250, -0.2],
        ["float16", 128, "cpu", "libraries", None, None, None, None, 300, None],
    ]
    prose = found.blocks[0]
    assert isinstance(prose, Prose)
    assert prose.text == (
        "**The computed sum is further than 10% from the measured peak**; the largest difference is 20.0%, at "
        "float16, 128 tokens, cpu, where 0.98 KiB were computed and 1.22 KiB measured."
    )
    assert "1 of 2 measurements did not finish." in found.opening
    assert "no dtype to recommend" in found.opening
    assert "dtype-to-choose" not in tables(found)


def test_bars_are_stacked_and_the_mark_is_the_measured_peak(tmp_path: Path) -> None:
    found = made(tmp_path, (memory_case(), memory()), (memory_case("float32"), memory("float32")))
    figure = next(block for block in found.blocks if isinstance(block, Figure))
    canvas = Canvas()
    hovers = figure.draw(canvas)
    edges = [(hover.left, hover.right) for hover in hovers if "float16" in hover.text]
    assert edges == [(0, 800), (800, 900), (900, 1000)]
    assert list(np.asarray(canvas.axes[0].get_lines()[0].get_xdata())) == [1040, 1040]
    prose = found.blocks[0]
    assert isinstance(prose, Prose)
    assert prose.text.startswith("All 2 computed sums are within 10% of the measured peak;")


def test_where_float16_breaks_it_is_not_chosen(tmp_path: Path) -> None:
    found = made(
        tmp_path,
        (run_case(), broken_run()),
        (run_case("bfloat16"), clean_run("bfloat16")),
        (run_case("float32"), clean_run("float32")),
        (memory_case("float32"), memory("float32")),
    )
    assert choice(found) == {
        "GPU with bfloat16": ("bfloat16", "bfloat16 is clean in its only case, with at least 114.0 bits of headroom."),
        "GPU without bfloat16": (
            "float32",
            "float16 breaks in its only case; it needs a repair first, such as scaling the residual stream down by a "
            "power of two; float32 is clean in its only case, with at least 114.0 bits of headroom.",
        ),
        "CPU only": (
            "float32",
            "float32 is clean in its only case, with at least 114.0 bits of headroom. Where memory is short, bfloat16 "
            "takes half as much: bfloat16 is clean in its only case, with at least 114.0 bits of headroom.",
        ),
    }
    assert [row[2] for row in tables(found)["dtype-to-choose"].rows] == [None, 800, 800]


def test_where_float16_is_clean_it_serves_a_gpu_without_bfloat16(tmp_path: Path) -> None:
    found = choice(made(tmp_path, (run_case(), clean_run())))
    assert found["GPU without bfloat16"] == (
        "float16",
        "float16 is clean in its only case, with at least 2.0 bits of headroom; a text with a larger token "
        "may still break it.",
    )
    assert found["GPU with bfloat16"][0] == "bfloat16"
    assert found["GPU with bfloat16"][1].startswith("bfloat16 did not run, but its range holds every value")
    assert found["CPU only"][0] == "float32"


def test_where_every_dtype_breaks_none_is_chosen(tmp_path: Path) -> None:
    runs = [(run_case(dtype), broken_run(dtype, kind="weight")) for dtype in ("float16", "bfloat16", "float32")]
    for dtype, why in choice(made(tmp_path, *runs)).values():
        assert dtype == "none"
        assert why.endswith("float32 breaks in its only case: the number format is not the cause, see the verdict.")


def test_an_empty_sweep_says_what_is_missing(tmp_path: Path) -> None:
    assert made(tmp_path, (memory_case(), None), (run_case(), None)).opening == (
        "No memory is known: the only measurement has not finished. No prompt has run to its end either, so "
        "there is no dtype to recommend."
    )
    assert made(tmp_path / "b", (run_case(), clean_run())).opening == (
        "This experiment measures no memory. The choice of a dtype rests on the texts and lengths that ran."
    )
