"""A user's own statistics: in every record, the frame and the file, and no exception of theirs in the model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from stabilitykit.diagnosis.layers import by_layer, stored
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import Gemma, query_blocks
from stabilitykit.recorder import Statistic, record
from stabilitykit.records import Recording
from stabilitykit.report.parts.by_layer import layers

Small = Callable[..., Gemma]

PEAK = Statistic("peak", "magnitude", lambda x: x.abs().nan_to_num(0.0, math.inf).max(), join=max)
SHARE = Statistic("negative", "fraction of elements", lambda x: (x < 0).float().mean())


def run(model: nn.Module, *inputs: Tensor, statistics: list[Statistic]) -> Recording:
    with torch.inference_mode(), record(model, statistics=statistics) as recording:
        model(*inputs)
    return recording


def test_every_record_has_them_and_they_are_the_functions_own(small: Small, tokens: Tensor) -> None:
    model = small(3)
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
    recording = run(model, tokens, statistics=[PEAK, SHARE])
    assert recording.header.statistics == {"peak": "magnitude", "negative": "fraction of elements"}
    for made in recording:
        assert list(made.extra) == ["peak", "negative"]
        assert made.extra["peak"] == made.amax
    for site in ("layers.1.mlp.down_proj", "lm_head"):
        assert recording.at(site).extra["negative"] == float((outputs[site] < 0).float().mean()) > 0.3


def test_without_any_nothing_is_added(small: Small, tokens: Tensor) -> None:
    recording = run(small(3), tokens, statistics=[])
    assert recording.header.statistics == {}
    assert all(made.extra == {} for made in recording)
    assert "peak" not in recording.frame


def test_frame_and_file_have_a_column_of_their_name(small: Small, tokens: Tensor, tmp_path: Path) -> None:
    recording = run(small(1, "float16", 2.0**17), tokens, statistics=[PEAK, SHARE])
    path = tmp_path / "run.parquet"
    recording.save(path)
    assert pq.read_schema(path).names[-2:] == list(recording.frame.columns)[-2:] == ["peak", "negative"]
    assert list(recording.frame["peak"]) == [made.extra["peak"] for made in recording]
    assert max(recording.frame["peak"]) == math.inf
    read = Recording.load(path)
    assert read.header == recording.header
    assert [made.extra for made in read] == [made.extra for made in recording]
    pd.testing.assert_frame_equal(read.frame, recording.frame)


def test_what_a_mask_hides_is_nan_and_what_was_lost_is_as_it_is() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 2.5, -math.inf) * 30000.0

    nans = Statistic("nans", "elements", lambda x: x.isnan().sum())
    infinities = Statistic("infinities", "elements", lambda x: x.isinf().sum())
    x = torch.tensor([[[1.0, 5.0, 3.0, 2.0]]], dtype=torch.float16)
    recording = run(Masked(), x, statistics=[nans, infinities])
    lost = recording.at("/mul.0")
    assert (lost.masked, lost.positive_inf) == (2, 2)
    assert lost.extra == {"nans": 2, "infinities": 2}


def test_float8_and_complex_numbers_come_in_a_dtype_to_compute_in() -> None:
    class Unusual(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.view_as_complex(x) * 2.0, (x * 96).to(torch.float8_e4m3fn)

    seen: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def largest(x: Tensor) -> Tensor:
        seen.append((x.dtype, tuple(x.shape)))
        return x.max()

    recording = run(Unusual(), torch.ones(1, 2, 2), statistics=[Statistic("largest", "value", largest)])
    assert recording.at("/cast.0").extra == {"largest": 96.0}
    assert set(seen) == {(torch.float32, (1, 2, 2))}


def test_a_function_that_raises_ends_no_forward_pass(small: Small, tokens: Tensor, tmp_path: Path) -> None:
    def picky(x: Tensor) -> float:
        if x.ndim == 4:
            raise ZeroDivisionError("not of attention")
        return 1.0

    model = small(3)
    with torch.inference_mode():
        expected = model(tokens)
    with (
        pytest.warns(UserWarning, match=r"'picky' is missing for \d+ tensors: .*ZeroDivisionError at .*layer"),
        torch.inference_mode(),
        record(model, statistics=[Statistic("picky", "nothing", picky), PEAK]) as recording,
    ):
        assert torch.equal(model(tokens), expected)
    (note,) = (note for note in recording.header.notes if "picky" in note)
    assert "not of attention" in note
    missing = [made for made in recording if made.extra["picky"] is None]
    assert f"missing for {len(missing)} tensors" in note
    assert {len(made.shape) for made in missing} == {4}
    assert all(made.extra["peak"] == made.amax for made in recording)
    recording.save(tmp_path / "run.parquet")
    assert Recording.load(tmp_path / "run.parquet").at(missing[0].site).extra["picky"] is None


@pytest.mark.parametrize("returned", [torch.ones(2), 1j, None, "three"])
def test_what_is_not_one_number_is_a_failure(returned: Any) -> None:
    with pytest.warns(UserWarning, match="statistic 'odd' is missing for 1 tensor: its function raised"):
        recording = run(nn.Linear(2, 2), torch.ones(1, 2), statistics=[Statistic("odd", "", lambda x: returned)])
    assert [made.extra for made in recording] == [{"odd": None}]


@pytest.mark.parametrize("generation", [1, 3])
def test_no_bit_of_the_model_changes_and_no_hook_sees_the_functions(
    small: Small, tokens: Tensor, generation: int
) -> None:
    model = small(generation, "float16")
    with torch.inference_mode():
        expected = model(tokens)
        with record(model) as plain:
            model(tokens)
        with record(model, statistics=[PEAK, SHARE]) as recording:
            logits = model(tokens)
    assert torch.equal(logits, expected)
    assert [made.site for made in recording] == [made.site for made in plain]


def test_on_the_meta_device_there_are_none() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(2, 2), torch.ones(1, 2)
    assert [made.extra for made in run(model, x, statistics=[PEAK])] == [{"peak": None}]


def test_tensors_made_by_blocks_have_those_that_can_be_joined(
    small: Small, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(1)
    whole = run(model, tokens, statistics=[PEAK, SHARE])
    monkeypatch.setattr(query_blocks, "WHOLE", 40)
    monkeypatch.setattr(query_blocks, "BLOCK", 40)
    parts = run(model, tokens, statistics=[PEAK, SHARE])
    site = "layers.1.self_attn/softmax.0"
    assert whole.at(site).extra["negative"] == 0.0
    assert parts.at(site).extra == {"peak": parts.at(site).amax, "negative": None}
    assert parts.at("lm_head").extra["peak"] == parts.at("lm_head").amax
    assert parts.at("lm_head").extra["negative"] == whole.at("lm_head").extra["negative"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["amax"], "already have a column 'amax'"),
        (["softmax"], "already have a column 'softmax'"),
        (["a", "a"], "Two statistics are named 'a'"),
        (["float16.zero"], "such as 'near_zero'; got 'float16.zero'"),
        ([""], "got ''"),
    ],
)
def test_a_name_is_a_column_of_its_own(names: list[str], said: str) -> None:
    statistics = [Statistic(name, "", lambda x: x.max()) for name in names]
    with pytest.raises(MisuseError, match=said), record(nn.Linear(2, 2), statistics=statistics):
        pass


def test_tables_by_layer_show_the_largest_of_each_layer(small: Small, tokens: Tensor) -> None:
    recording = run(small(3), tokens, statistics=[PEAK, SHARE])
    shown = layers(recording)
    assert [(column.name, column.unit) for column in shown.columns][-3:-1] == [
        ("peak", "magnitude"),
        ("negative", "fraction of elements"),
    ]
    by_name = {str(row[0]): row for row in shown.rows}
    for part in by_layer(recording):
        own = [record for record in stored(recording) if str(record.layer) == part.name]
        if own:
            assert by_name[part.name][-3] == part.amax
            assert by_name[part.name][-2] == max(record.extra["negative"] or 0.0 for record in own)
