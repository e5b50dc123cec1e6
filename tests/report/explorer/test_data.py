"""What the explorer is given: every record, no more text than the records hold, and magnitudes on their own side."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explored import HOSTILE, TOKENS, toy_run, toy_sweep
from hypothesis import given
from hypothesis import strategies as st
from swept import record, run_case, sweep

from stabilitykit.formats import FORMATS, number_format
from stabilitykit.records import Recording
from stabilitykit.records.sweep import Results
from stabilitykit.report.explorer import data
from stabilitykit.report.explorer.assets import packed
from stabilitykit.report.explorer.data import Explored, explored
from stabilitykit.report.explorer.numbers import BY_POSITION, NOTHING, differences, in_steps, short

ROOT = Path(__file__).parents[3]


def read(results: Results) -> tuple[Explored, dict[str, Any]]:
    found = explored(results)
    assert found is not None
    return found, json.loads(found.document)


def test_every_record_of_every_run_is_there_with_its_place(toy: Results) -> None:
    found, document = read(toy)
    assert (found.records, found.left_out, found.maps) == (21, 0, 1)
    run = document["groups"][0]
    assert [part["dtype"] for part in run["runs"]] == ["float32", "float16", "bfloat16"]
    texts = document["texts"]
    for part, (_, recording) in zip(run["runs"], toy.runs(), strict=True):
        assert [texts[site] for site in part["site"]] == [record.site for record in recording]
        assert part["layer"] == [-1 if record.layer is None else record.layer for record in recording]
        assert list(np.cumsum(part["order"])) == [record.order for record in recording]


def test_a_row_is_a_site_of_all_layers_and_keeps_the_order_of_execution(toy: Results) -> None:
    _, document = read(toy)
    texts = document["texts"]
    paths = [texts[path] for _, _, path, _ in document["groups"][0]["rows"]]
    hostile = HOSTILE.removeprefix("layers.1/")
    assert paths == ["embed_tokens", "softmax.0", "output", "norm/pow.0", hostile, "lm_head"]


def test_sites_that_only_one_dtype_has_stand_where_they_run(tmp_path: Path) -> None:
    """float16 rounds the probabilities: a site between two that float32 has too."""
    runs = {
        "float32": ["layers.0/softmax.0", "layers.0/matmul.0"],
        "float16": ["layers.0/first.0", "layers.0/softmax.0", "layers.0/cast.0", "layers.0/matmul.0"],
    }
    pairs = [
        (run_case(dtype), Recording(toy_run(dtype).header, [record(i, site, dtype) for i, site in enumerate(sites)]))
        for dtype, sites in runs.items()
    ]
    _, document = read(sweep(tmp_path / "toy", pairs))
    paths = [document["texts"][path] for _, _, path, _ in document["groups"][0]["rows"]]
    assert paths == ["first.0", "softmax.0", "cast.0", "matmul.0"]


def test_two_stacks_of_layers_have_rows_of_their_own(tmp_path: Path) -> None:
    recording = toy_run("float32")
    sites = ["encoder.layers.0.fc1", "decoder.layers.0.fc1"]
    recording.records = [replace(record(i, "layers.0", "float32"), site=site) for i, site in enumerate(sites)]
    _, document = read(sweep(tmp_path / "toy", [(run_case("float32"), recording)]))
    stacks = [document["texts"][stack] for stack, _, _, _ in document["groups"][0]["rows"]]
    assert stacks == ["encoder.layers", "decoder.layers"]


def test_it_begins_with_the_first_break_in_the_format_in_question(toy: Results) -> None:
    _, document = read(toy)
    group, run = document["start"]
    assert document["groups"][group]["runs"][run]["dtype"] == "float16"
    (broke,) = document["groups"][group]["runs"][run]["breaks"].values()
    assert broke["said"] == "68,000 exceeds the float16 maximum, 65,504"
    assert broke["where"] == "at token 0 '<bos>', channel 2"


@given(
    form=st.sampled_from(sorted(FORMATS)),
    value=st.floats(min_value=1e-38, max_value=1e38) | st.sampled_from([65504.0, 65519.99, 65520.0, 464.0, 464.1]),
)
def test_a_magnitude_in_steps_stays_on_its_side_of_the_maximum(form: str, value: float) -> None:
    """Against the format's own rule; and within half a step, or within one where that would cross the edge."""
    found = number_format(form)
    (step,) = in_steps([value], BY_POSITION, found)
    again = 2.0 ** (step / BY_POSITION)
    assert found.overflows(again) == found.overflows(value)
    assert abs(math.log2(again / value)) <= 1.001 / BY_POSITION


def test_what_is_no_magnitude_has_a_step_of_its_own() -> None:
    form = number_format("float16")
    assert in_steps([0.0, math.nan, math.inf, 1.0], 16, form).tolist() == [NOTHING, NOTHING, NOTHING, 0]


def test_profiles_of_other_dtypes_are_told_against_the_first(toy: Results) -> None:
    """All of them come back when they are added to it; bfloat16's residual is half as large again in layer 0."""
    _, document = read(toy)
    first, _, third = document["groups"][0]["runs"]
    assert first["profile"]["2"] == in_steps([200.0, 100.0, 50.0], BY_POSITION, number_format("float16")).tolist()
    scaled = in_steps([300.0, 100.0, 50.0], BY_POSITION, number_format("float16"))
    assert np.add(first["profile"]["2"], third["profile"]["2"]).tolist() == scaled.tolist()
    assert third["profile"]["2"][1:] == [0, 0]


def test_numbers_have_as_many_digits_as_are_shown() -> None:
    assert [short(value) for value in (None, 0.0, 1234567.0, 0.123456, -0.5)] == [None, 0, 1235000, 0.1235, -0.5]
    assert [short(value) for value in (math.nan, math.inf, -math.inf)] == ["nan", "inf", "-inf"]
    assert short(68384.0, 6) == 68384
    assert differences([5, 7, 4]) == [5, 2, -3]


def test_a_redacted_run_has_no_token_in_it(tmp_path: Path) -> None:
    open_, _ = read(toy_sweep(tmp_path / "open"))
    assert all(json.dumps(token)[1:-1] in open_.document for token in TOKENS.values())
    redacted = toy_run("float32", tokens=None, token_texts={})
    redacted.records = [replace(record, amax_token=None, amax_token_text=None) for record in redacted]
    found, _ = read(sweep(tmp_path / "toy", [(run_case("float32", bos=None), redacted)]))
    assert not any(json.dumps(token)[1:-1] in found.document for token in TOKENS.values())


def test_too_many_records_are_cut_to_the_worst_step_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, of which the second is larger in one site and smaller in another."""
    recording = toy_run("float32")
    grown = {"layers.0": 900.0, "lm_head": 1.0}
    later = [replace(r, step=1, order=r.order + 9, amax=grown.get(r.site, r.amax)) for r in recording]
    recording.records = [*recording, *later]
    results = sweep(tmp_path / "toy", [(run_case("float32"), recording)])
    whole, _ = read(results)
    assert (whole.records, whole.left_out) == (14, 0)
    assert "more" not in data.told(whole)
    monkeypatch.setattr(data, "MOST", 10)
    found, document = read(results)
    assert (found.records, found.left_out) == (7, 7)
    run = document["groups"][0]["runs"][0]
    steps = dict(zip((document["texts"][site] for site in run["site"]), run["step"], strict=True))
    assert (steps["layers.0"], steps["lm_head"], steps["embed_tokens"]) == (1, 0, 0)
    assert "7 records more are in the files of the sweep alone" in data.told(found)


def test_a_report_of_ten_thousand_records_grows_by_less_than_a_megabyte() -> None:
    """The records of reports/float16_break, compressed, as the page carries them."""
    found, _ = read(Results.open(ROOT / "reports" / "float16_break"))
    assert found.records > 10_000
    assert len(packed(found.document)) < 920_000
