"""A recording's plots: what is drawn is what the records hold, on the axes given, and the user's own style stays."""

import math
from collections.abc import Iterator
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from recordings import HEADER, broke, lost_everything, made

import stabilitykit as sk
from stabilitykit.errors import MisuseError
from stabilitykit.records import Recording

LAYERS = (8192.0, 32752.0, 4096.0)  # the largest value of each


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    backend = matplotlib.get_backend()
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")
    pyplot.switch_backend(backend)


def recording(**last: object) -> Recording:
    """Three layers of two sites; inside a norm a square that float32 holds on purpose."""
    records = []
    for layer, amax in enumerate(LAYERS):
        records.append(made(3 * layer, f"layers.{layer}.norm/pow.0", dtype="float32", amax=3e9))
        records.append(made(3 * layer + 1, f"layers.{layer}/add.0", label="residual after attention", amax=amax / 4))
        records.append(made(3 * layer + 2, f"layers.{layer}", label="residual after MLP", amax=amax))
    records[-1] = replace(records[-1], **last)  # type: ignore[arg-type]
    return Recording(HEADER, records)


def test_headroom_by_layer_is_the_least_of_what_is_stored() -> None:
    axes = recording().plot()
    line = axes.lines[0]
    assert np.asarray(line.get_xdata()).tolist() == [0, 1, 2]
    np.testing.assert_allclose(np.asarray(line.get_ydata()), [math.log2(65504 / amax) for amax in LAYERS])
    assert axes.get_ylabel() == "least headroom in float16 [bits]"
    assert axes.get_xlabel() == "layer"


def test_a_layer_that_lost_elements_is_marked_and_has_no_headroom() -> None:
    axes = recording(positive_inf=1, broke=broke()).plot("headroom")
    line, _, marks = axes.lines
    assert math.isnan(np.asarray(line.get_ydata())[2])
    assert (np.asarray(marks.get_xdata()).tolist(), marks.get_label()) == ([2], "holds NaN or inf")


def test_another_format_shows_what_it_would_overflow() -> None:
    axes = recording().plot(in_format="float8_e5m2")
    assert axes.get_ylabel() == "least headroom in float8_e5m2 [bits]"
    narrow = recording().plot(in_format="float8_e4m3fn")
    assert max(np.asarray(narrow.lines[0].get_ydata())) < 0


def test_the_map_has_a_cell_for_each_layer_and_stored_site() -> None:
    axes = recording(positive_inf=1).plot("heat")
    grid = axes.images[0].get_array()
    assert grid is not None
    assert grid.shape == (2, 3)
    np.testing.assert_allclose(grid[0], [math.log2(65504 * 4 / amax) for amax in LAYERS])
    assert np.ma.getmaskarray(grid)[1].tolist() == [False, False, True]  # broken: no headroom
    assert [text.get_text() for text in axes.get_yticklabels()] == ["residual after attention", "residual after MLP"]
    assert axes.get_xlabel() == "layer, float16 run"


def test_exponents_are_the_counts_of_the_site() -> None:
    axes = recording().plot("exponents", site="layers.1")
    drawn = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_width() < 1]
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in drawn}
    assert {at: amount for at, amount in bars.items() if amount} == {-1: 11, 3: 1}
    assert axes.get_title(loc="left") == "layer 1, residual after MLP"


def test_exponents_are_by_default_those_of_what_broke_or_else_of_the_largest() -> None:
    assert recording().plot("exponents").get_title(loc="left") == "layer 1, residual after MLP"
    broken = recording(positive_inf=1, broke=broke()).plot("exponents")
    assert broken.get_title(loc="left") == "layer 2, residual after MLP; 1 of 12 are NaN or infinite"


def test_axes_that_are_given_are_drawn_on_and_the_users_style_stays() -> None:
    before = dict(matplotlib.rcParams)
    figure, axes = pyplot.subplots(1, 2)
    assert sk.plot(recording(), ax=axes[1]) is axes[1]
    assert not axes[0].lines
    assert recording().plot().figure is not figure
    assert dict(matplotlib.rcParams) == before


def test_misuse_says_what_there_is() -> None:
    with pytest.raises(MisuseError, match="unknown kind 'pie'; choose one of: headroom, heat, exponents"):
        recording().plot("pie")  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="similar sites"):
        recording().plot("exponents", site="nowhere")
    with pytest.raises(MisuseError, match='belongs to kind="exponents"'):
        recording().plot("heat", site="layers.1")
    with pytest.raises(MisuseError, match="step 3"):
        recording().plot(step=3)
    with pytest.raises(MisuseError, match="no finite element"):
        Recording(HEADER, [lost_everything(0, "layers.0", exponents=())]).plot("exponents")
    with pytest.raises(MisuseError, match="Unknown number format"):
        recording().plot(in_format="int8")


def test_what_a_notebook_shows_is_the_verdict_escaped() -> None:
    shown = recording(positive_inf=1, broke=broke())._repr_html_()
    assert "<p><b>Recording: toy, float16, 9 tensors, 0 steps</b></p>" in shown
    assert "float16 overflows in layer 2, residual after MLP" in shown
    assert "&#x27;&lt;bos&gt;&#x27;, channel 2" in shown
    assert "<bos>" not in shown
    named = Recording(replace(HEADER, checkpoint="<script>alert(1)</script>"), [])
    assert "<script>" not in named._repr_html_()
