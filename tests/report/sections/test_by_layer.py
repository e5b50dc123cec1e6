"""Peaks, heat, exponents, softmax and error: every number is a record's, and what is lost is not drawn as zero."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from swept import three_dtypes

from stabilitykit.report.blocks import Figure, Prose, Section, Table
from stabilitykit.report.sections import error, exponents, heat, peaks, softmax

FLOAT16, BFLOAT16 = 65504.0, 3.3895313892515355e38


def tables(found: Section) -> dict[str, Table]:
    return {block.name: block for block in found.blocks if isinstance(block, Table)}


def figures(found: Section) -> dict[str, Figure]:
    return {block.name: block for block in found.blocks if isinstance(block, Figure)}


def prose(found: Section) -> str:
    return " ".join(block.text for block in found.blocks if isinstance(block, Prose))


def hovers(figure: Figure, canvas: Canvas | None = None) -> list[str]:
    return [hover.text for hover in figure.draw(canvas or Canvas())]


def test_peaks_are_those_of_the_records_against_each_formats_end(tmp_path: Path) -> None:
    found = peaks.section(three_dtypes(tmp_path))
    rows = {(row[0], row[1]): row for row in tables(found)["peaks"].rows}
    clean = "prose, 3 tokens, with <bos>"
    assert [rows[clean, dtype][2] for dtype in ("float32", "float16", "bfloat16")] == [201.0, 201.0, 603.0]
    assert list(rows[clean, "bfloat16"][6:8]) == [
        pytest.approx(math.log2(BFLOAT16 / 603)), pytest.approx(math.log2(FLOAT16 / 603)),
    ]  # fmt: skip
    by_layer = tables(found)["peaks-by-layer-with-bos"]
    names = [column.name for column in by_layer.columns]
    high = names.index("residual, bfloat16")
    assert [(row[0], row[high]) for row in by_layer.rows] == [(0, 600.0), (1, 603.0)]
    canvas = Canvas()
    hovers(figures(found)["peaks-with-bos"], canvas)
    curves = [list(np.asarray(line.get_ydata())) for line in canvas.axes[0].get_lines()]
    assert [300.0, 600.0, 303.0, 603.0] in curves
    assert any(set(curve) == {FLOAT16} for curve in curves)  # the format's end


def test_a_break_is_marked_with_its_value_and_what_follows_is_not_drawn(tmp_path: Path) -> None:
    found = peaks.section(three_dtypes(tmp_path))
    assert (
        "**prose, 3 tokens, without <bos>**: float16 breaks at 3 tokens in layer 0, residual after MLP, at token 0"
        in prose(found)
    )
    assert "float16 breaks: 68,000 in layer 0, residual after MLP, above the maximum, 65,504" in hovers(
        figures(found)["peaks-without-bos"]
    )
    assert [row[0] for row in tables(found)["peaks-by-layer-without-bos"].rows] == [0]


def test_heat_is_headroom_in_bits_and_says_what_was_lost(tmp_path: Path) -> None:
    found = heat.section(three_dtypes(tmp_path))
    assert [(row[1], row[2], row[3]) for row in tables(found)["headroom-with-bos"].rows] == [
        ("output", 1, 201.0),
        ("add.0", 1, 101.0),
        ("mlp.down_proj", 1, 51.0),
        ("self_attn/softmax.0", 0, 0.9),
    ]
    for row in tables(found)["headroom-with-bos"].rows:
        assert row[6] == pytest.approx(math.log2(FLOAT16 / float(str(row[3]))))
    texts = hovers(figures(found)["headroom-float32-with-bos"])
    assert "layer 1, residual after MLP: 8.3 bits, largest 201, at token 1 ' a'" in texts
    assert len(texts) == 4 * 2
    broken = hovers(figures(found)["headroom-float16-without-bos"])
    assert "layer 0, residual after MLP: 1 of 12 elements are inf or NaN" in broken
    assert "layer 1, add.0: not recorded" in broken


def test_histograms_count_the_elements_of_the_worst_layer(tmp_path: Path) -> None:
    found = exponents.section(three_dtypes(tmp_path))
    assert [row[:6] for row in tables(found)["exponent-counts-with-bos"].rows] == [
        ["residual after MLP", 1, 12, 0, 0.5, 201.0],
        ["residual after attention", 1, 12, 0, 0.5, 101.0],
        ["down projection", 1, 12, 0, 0.5, 51.0],
        ["logits", None, 12, 0, 0.5, 20.0],
        ["embedding, scaled", None, 12, 0, 0.5, 4.0],
        ["attention probabilities", 0, 12, 0, 0.5, 0.9],
    ]
    texts = Counter(hovers(figures(found)["exponents-with-bos"]))
    assert texts["2^-1 to 2^0: 11 of 12 elements"] == texts["2^3 to 2^4: 1 of 12 elements"] == 6
    assert texts["float16: subnormal from 5.96e-08, normal from 6.104e-05, largest 65,504"] >= 1


def test_softmax_is_told_by_layer_and_head(tmp_path: Path) -> None:
    found = softmax.section(three_dtypes(tmp_path))
    for row in tables(found)["softmax"].rows:
        assert row[2:] == [2, 1.0, 1.25, 11.0, 9.0, 0.125, 1e-7, 0, 0]
    texts = hovers(figures(found)["softmax-with-bos"])
    for layer in (0, 1):
        assert f"layer {layer}, head 0: 1 nats on average, 0.25 at least" in texts
        assert f"layer {layer}, head 1: 1.5 nats on average, 0.5 at least" in texts
    assert "float32: largest logit 11 (layer 1), at most 12.5% of a layer's probabilities underflow." in prose(found)


def test_errors_are_those_of_the_logits_and_of_each_layer(tmp_path: Path) -> None:
    found = error.section(three_dtypes(tmp_path))
    rows = {(row[0], row[1]): row[3:] for row in tables(found)["error"].rows}
    assert rows["prose, 3 tokens, with <bos>", "bfloat16"] == [0.001, 0.02, 0.75, 4, 4, None]
    assert rows["prose, 3 tokens, without <bos>", "float16"] == [*[None] * 5, "layer 0, residual after MLP"]
    by_layer = tables(found)["error-by-layer-with-bos"]
    assert [column.name for column in by_layer.columns][1] == "residual after MLP, float16"
    assert [list(row) for row in by_layer.rows] == [[0, 50.0, 50.0, 40.0, 40.0], [1, 49.0, 49.0, 39.0, 39.0]]
    assert hovers(figures(found)["error-logits"]) == [
        "bfloat16: KL 0.001 nats on average, 0.02 at most; same likeliest token at 75.0% of 4 positions"
    ]
