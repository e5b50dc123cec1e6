"""The chain of one broken run, and what is said where there is none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from swept import broken_run, clean_run, lengths_case, run_case, sweep

from stabilitykit.report.blocks import Figure, Prose, Section, Table
from stabilitykit.report.sections.chain import section


def made(folder: Path, *pairs: Any) -> Section:
    return section(sweep(folder / "toy", pairs))


def test_the_first_broken_run_in_float16_is_followed_to_its_error(tmp_path: Path) -> None:
    found = made(
        tmp_path,
        (run_case("float8_e5m2"), broken_run("float8_e5m2")),
        (run_case(), broken_run()),
        (run_case("float32"), clean_run("float32", watched=(("layers.0", 2, 68123.0),))),
    )
    assert "in `prose` with `<bos>` in float16 at 3 tokens. It is the first of 2 runs that broke." in found.opening
    prose, table, figure = found.blocks
    assert isinstance(prose, Prose)
    assert "The float32 run has 68,123 there." in prose.text
    assert isinstance(table, Table)
    assert [list(row) for row in table.rows] == [
        ["break", "layers.0", "residual after MLP", "add", "overflow: 1 element lost at position 0 '<bos>', channel 2"],
        ["first NaN", "layers.1", None, "add", "inf - inf makes 12 NaN"],
        ["layer", "layers.1", None, "add", "12 NaN, in 3 of 3 tokens and 4 of 4 channels"],
        ["logits", "lm_head", None, "matmul", "every logit is NaN"],
        ["error", "sampler", None, None, "no `probabilities`"],
    ]
    assert isinstance(figure, Figure)
    assert figure.alt.endswith("The first loss in a layer's output is in layer 0; from layer 1 on everything is lost.")
    canvas = Canvas()
    hovers = figure.draw(canvas)
    assert [hover.text for hover in hovers] == [
        "layer 0: 1 of 3 tokens, 1 of 4 channels lost",
        "layer 1: 3 of 3 tokens, 4 of 4 channels lost",
    ]
    curves = [list(np.asarray(line.get_ydata())) for line in canvas.axes[0].get_lines()]
    assert curves[:2] == [[1 / 3, 1.0], [0.25, 1.0]]


def test_a_run_without_layers_has_no_figure(tmp_path: Path) -> None:
    run = broken_run()
    run.records = [record for record in run.records if not record.site.endswith(("layers.0", "layers.1"))]
    run.records[0] = broken_run().records[1]
    found = made(tmp_path, (run_case(), run))
    assert [type(block) for block in found.blocks] == [Prose, Table, Figure]
    run.records[0] = replace(run.records[0], site="/add.0", layer=None)
    found = made(tmp_path / "none", (run_case(), run))
    assert [type(block) for block in found.blocks] == [Prose, Table]


def test_no_chain_is_explained(tmp_path: Path) -> None:
    openings = [
        made(tmp_path / "a", (lengths_case(), None)).opening,
        made(tmp_path / "b", (run_case(), None)).opening,
        made(tmp_path / "c", (run_case(), None), (run_case("float32"), None)).opening,
        made(tmp_path / "d", (run_case(), clean_run())).opening,
        made(tmp_path / "e", (run_case(), clean_run()), (run_case("float32"), clean_run("float32"))).opening,
    ]
    assert openings == [
        "This experiment records no run in full, so no break can be followed to the sampler.",
        "The one run to be recorded in full has not finished.",
        "None of the 2 runs to be recorded in full has finished.",
        "The one run that was recorded in full did not break: there is no chain to follow.",
        "None of the 2 runs that were recorded in full broke: there is no chain to follow.",
    ]
