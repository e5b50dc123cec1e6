"""The frame of a recording: documented column by column, of dtypes that no run changes, and what two columns say."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from recordings import HEADER, broke, lost_everything, made
from test_package import ROOT

import stabilitykit as sk
from stabilitykit.records import Recording

TINY = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512"


def documented() -> dict[str, tuple[str, str, str]]:
    """Of each column in docs/records.md: dtype, unit, meaning."""
    section = (ROOT / "docs" / "records.md").read_text().partition("\n### Columns of the frame\n")[2]
    section = section.partition("\n## ")[0]
    found = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            name, *rest = (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1]))
            dtype, unit, meaning = rest
            found[name.strip("`")] = dtype, unit, meaning
    return found


BROKEN = Recording(
    HEADER, [made(0, "layers.0/add.0"), made(1, "layers.0", positive_inf=1, broke=broke()), lost_everything(2, "norm")]
)


@pytest.mark.parametrize("recording", [BROKEN, Recording(HEADER, [])], ids=["broken", "empty"])
def test_every_column_is_documented_with_its_dtype(recording: Recording) -> None:
    told = documented()
    frame = recording.frame
    real = {str(name).replace("float16.", "FORMAT."): str(dtype) for name, dtype in frame.dtypes.items()}
    assert list(real) == list(told)
    assert real == {name: dtype for name, (dtype, _, _) in told.items()}
    assert all(meaning for _, _, meaning in told.values())
    numbers = {name for name, (dtype, _, _) in told.items() if dtype in ("float64", "int64", "Int64")}
    plain = {"order", "step", "layer", "broke.origin_kind", "broke.scaled"}
    assert {name for name in numbers - plain if not told[name][1]} == set()  # a number has a unit


def test_values_are_the_records_own() -> None:
    frame = BROKEN.frame
    for (_, row), record in zip(frame.iterrows(), BROKEN, strict=True):
        for name, value in record.row().items():
            if isinstance(value, tuple):
                assert row[name] == value
            elif value is None or value != value:
                assert row[name] is None or pd.isna(row[name]), name
            else:
                assert row[name] == value, name


def test_headroom_is_that_of_the_dtype_the_tensor_is_stored_in() -> None:
    records = [
        made(0, "a", amax=16376.0),
        made(1, "b", amax=16376.0, dtype="float32"),
        made(2, "c", amax=0.0),
        made(3, "d", nan=1),
        made(4, "e", amax=None, masked=12),
        made(5, "f", masked=6, amax=32752.0),
        made(6, "g", amax=1.0, dtype="int8"),
        lost_everything(7, "h"),
    ]
    found = Recording(HEADER, records).frame.set_index("site")["headroom"]
    expected = [2.0, math.log2(float(np.finfo(np.float32).max) / 16376), math.inf, -math.inf, math.nan, 1.0, math.nan]
    np.testing.assert_allclose(found.to_numpy(), [*expected, -math.inf], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_documented_selection_leaves_out_what_is_computed_in_float32_on_purpose(dtype: str) -> None:
    """A residual stream whose squares are far past 65,504 before the norm divides by them."""
    frame = sk.profile(TINY, "Hi", dtypes=[dtype], rescale=512.0)[dtype].frame
    assert frame.amax.max() > 65504
    assert frame[frame.stored].groupby("layer").amax.max().max() < 65504
    inside = frame[frame.site.str.contains(r"norm/(?:pow|mean|rsqrt)")]
    assert len(inside) > 10
    assert not inside.stored.any()
    assert frame[frame.site.str.endswith("down_proj")].stored.all()


def test_a_float16_model_that_is_recorded_by_hand_has_the_same_selection() -> None:
    model = sk.load(TINY, dtype="float16")
    with torch.inference_mode(), sk.record(model) as recording:
        model(torch.tensor([[2, 70]]))
    frame = recording.frame
    assert (frame.stored_dtype == frame.dtype).all()
    assert (frame.stored == (frame.dtype == "float16")).all()
    assert 0 < frame.stored.sum() < len(frame)
