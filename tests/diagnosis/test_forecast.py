"""Forecasts: exact counts against ml_dtypes, the first site in order, what is refused, and whether they come true."""

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.diagnosis.forecast import forecast, overflow_becomes, prediction
from stabilitykit.diagnosis.weights import weights_sentence
from stabilitykit.errors import MisuseError
from stabilitykit.formats import FLOAT16
from stabilitykit.records import FormatCounts, Header, Record, Recording, StoredWeights, WeightCounts
from stabilitykit.run.case import run_case
from stabilitykit.scaling.stressed import stressed

SHAPE = "layers=3&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&vocabulary=512"
SPECS = {
    1: f"random:gemma-2b?{SHAPE}",
    2: f"random:gemma2-2b?{SHAPE}&window=4",
    3: f"random:gemma3-270m?{SHAPE}&window=4&global_every=2",
}
TOKENS = [2, 70, 71, 72, 73, 74, 75]
HEADER = Header(
    checkpoint="toy", sha256=None, dtype="float32", device="cpu", level="operators", matmul="native",
    formats=("float16", "float8_e4m3fn"), rows=1, tokens=((2, 7, 9),), token_texts={2: "<bos>", 7: " a", 9: "."},
)  # fmt: skip


def made(order: int, site: str, amax: float, **changes: Any) -> Record:
    over, eighth = int(FLOAT16.overflows(amax)), int(amax > 464)
    healthy = Record(
        order=order, step=0, site=site, label=None, module=site.partition("/")[0], operator="add", layer=order,
        dtype="float32", shape=(1, 3, 4), stored_dtype="float16", elements=12, masked=2, nan=0, positive_inf=0,
        negative_inf=0, zero=0, subnormal=0, amax=amax, smallest=0.5, minimum=-8.0, maximum=1.0, mean=0.0, rms=1.0,
        exponent_first=-1, exponents=(10,),
        formats={"float16": FormatCounts(over, 3, 1), "float8_e4m3fn": FormatCounts(4 * eighth, 5, 6)},
        amax_row=0, amax_position=1, amax_channel=2, amax_token=7, amax_token_text=" a", positions=3, channels=4,
    )  # fmt: skip
    return replace(healthy, **changes)


def test_the_first_in_order_is_named_and_only_what_is_stored_low_is_judged() -> None:
    run = Recording(
        HEADER,
        [
            made(0, "layers.0/pow.0", 1e10, stored_dtype="float32"),
            made(1, "layers.1", 70000.0),
            made(2, "layers.2", 90000.0),
            made(3, "sampler/div.0", 1e6, stored_dtype=None),
        ],
    )
    found = forecast(run, "float16")
    assert found.first is run.records[1]
    assert (found.judged, found.elements, found.overflow, found.past) == (2, 20, 1, 2)
    assert (found.subnormal, found.zero) == (6, 2)
    assert found.closest is run.records[2]
    assert found.headroom == pytest.approx(np.log2(65504 / 90000))
    assert found.breaks
    assert prediction(run, found) == (
        "float16 would overflow first in layer 1, layers.1, operator add: 1 element exceeds the maximum, 65,504; the "
        "largest magnitude there is 70,000, at token 1 ' a'."
    )
    assert prediction(run, forecast(run, "float8_e4m3fn")).startswith(
        "float8_e4m3fn would overflow first in layer 1, layers.1, operator add: 4 elements exceed the maximum, 448; "
    )


def test_a_format_that_holds_everything() -> None:
    run = Recording(HEADER, [made(0, "layers.0", 1000.0)])
    found = forecast(run, "torch.float16")
    assert found.first is None
    assert not found.breaks
    assert prediction(run, found) == (
        "float16 would hold every value: the largest magnitude is 1,000, in layer 0, layers.0, operator add: 6.0 bits "
        "of headroom below the maximum (65,504)."
    )


def test_a_weight_that_leaves_the_range_is_a_break_too() -> None:
    worst = WeightCounts(name="norm.weight", elements=8, overflow=2, subnormal=0, zero=0, nonfinite=0)
    stored = StoredWeights(
        dtype="float8_e4m3fn", elements=100, overflow=2, subnormal=0, zero=0, nonfinite=0, worst=(worst,)
    )
    run = Recording(HEADER, [made(0, "layers.0", 10.0)])
    found = forecast(run, "float8_e4m3fn", stored)
    assert found.breaks
    assert prediction(run, found) == (
        "Of 100 weights stored in float8_e4m3fn, 2 become NaN, mostly in norm.weight. float8_e4m3fn would hold every "
        "activation, not every weight: the largest magnitude of an activation is 10, in layer 0, layers.0, operator "
        "add: 5.5 bits of headroom below the maximum (448)."
    )
    one = replace(stored, overflow=1, worst=(replace(worst, overflow=1, index=(3,), value=500.0),))
    assert prediction(run, forecast(run, "float8_e4m3fn", one)).startswith(
        "Of 100 weights stored in float8_e4m3fn, 1 becomes NaN, norm.weight[3], 500. float8_e4m3fn would hold every "
        "activation, not every weight"
    )


def test_the_parameter_that_is_named_has_the_most_of_what_is_counted() -> None:
    worst = [
        WeightCounts(name=name, elements=80, overflow=0, subnormal=0, zero=0, nonfinite=0)
        for name in ("norm.weight", "gate_proj.weight")
    ]
    worst = [replace(worst[0], overflow=1, index=(3,), value=70_144.0), replace(worst[1], zero=64, subnormal=3)]
    stored = StoredWeights(
        dtype="float16", elements=1000, overflow=1, subnormal=309, zero=64, nonfinite=0, worst=tuple(worst)
    )
    assert weights_sentence(stored) == (
        "Of 1,000 weights stored in float16, 1 becomes infinite (norm.weight[3], 70,144), 64 become zero (mostly in "
        "gate_proj.weight) and 309 go subnormal."
    )
    block = replace(worst[0], overflow=0, nonfinite=256, block=5, block_size=256)
    lost = replace(stored, overflow=0, nonfinite=256, zero=0, subnormal=0, worst=(block,))
    assert weights_sentence(lost) == (
        "Of 1,000 weights stored in float16, 256 are NaN or infinite in the checkpoint itself, in block 5 of "
        "norm.weight."
    )


def test_the_first_position_that_overflows_is_named_beside_the_largest() -> None:
    run = Recording(HEADER, [made(0, "layers.0", 90000.0, position_amax=(70000.0, 90000.0, 1.0))])
    assert prediction(run, forecast(run, "float16")).endswith(
        "1 element exceeds the maximum, 65,504, the first at token 0 '<bos>'; the largest magnitude there is 90,000, "
        "at token 1 ' a'."
    )
    only = Recording(HEADER, [made(0, "layers.0", 90000.0, position_amax=(7.0, 90000.0, 1.0))])
    assert "the first" not in prediction(only, forecast(only, "float16")).partition("exceeds")[2]


def test_what_cannot_be_forecast_is_refused() -> None:
    run = Recording(HEADER, [made(0, "layers.0", 1.0)])
    with pytest.raises(MisuseError, match="no counts for bfloat16, only for float16, float8_e4m3fn"):
        forecast(run, "bfloat16")
    with pytest.raises(MisuseError, match="Unknown number format 'float4'; choose one of: "):
        forecast(run, "float4")
    with pytest.raises(MisuseError, match="this recording does not say"):
        forecast(Recording(HEADER, [made(0, "layers.0", 1.0, stored_dtype=None)]), "float16")
    broken = run_case(stressed(random_checkpoint(SPECS[3]), 2.0**15, dtype="float16"), TOKENS).recording
    with pytest.raises(MisuseError, match="this one does not, from"):
        forecast(broken, "float16")


@pytest.mark.parametrize(("name", "becomes"), [("float16", "±inf"), ("float8_e4m3fn", "NaN"), ("float8_e5m2", "±inf")])
def test_what_a_value_past_the_range_becomes(name: str, becomes: str) -> None:
    assert overflow_becomes(name) == becomes
    with np.errstate(over="ignore"):
        cast = np.float64(1e6).astype(np.float16 if name == "float16" else getattr(ml_dtypes, name))
    assert str(float(cast)).lower() == becomes.lstrip("±").lower()


def test_a_cast_that_saturates_cuts_off() -> None:
    """torch's own cast to e4m3fn on a CPU does; one to 16 bits never does."""
    assert overflow_becomes("float8_e4m3fn", saturating=True) == "±448"
    assert torch.tensor([500.0, 1e6, math.inf]).to(torch.float8_e4m3fn).float().tolist() == [448.0] * 3
    assert float(torch.tensor(1e6).to(torch.float8_e5m2).float()) == math.inf
    assert overflow_becomes("float8_e5m2", saturating=True) == "±57,344"
    assert overflow_becomes("float16", saturating=True) == "±inf"
    run = Recording(HEADER, [made(0, "layers.0", 70000.0)])
    found = forecast(run, "float8_e4m3fn", saturating=True)
    assert (found.past, found.breaks) == (4, False)
    assert prediction(run, found).startswith("float8_e4m3fn would saturate first in layer 0")
    assert forecast(run, "float16", saturating=True).breaks


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("rescale", [1.0, 2.0**9])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_counts_are_those_of_a_cast_of_every_modules_output(generation: int, rescale: float, name: str) -> None:
    """ml_dtypes and numpy cast without saturating; modules whose outputs a float16 run stores in float16."""
    model = stressed(random_checkpoint(SPECS[generation]), rescale)
    outputs: list[np.ndarray[Any, Any]] = []
    handles = [
        module.register_forward_hook(lambda m, a, out: outputs.append(out.numpy().astype(np.float32)))
        for path, module in model.named_modules()
        if (path or generation == 2)  # whose soft-cap comes after the head
        and path != "rotary_emb"
        and not path.startswith("sampler")
        and not path.endswith((".self_attn", ".mlp"))
    ]  # those two hand on what the last of their own modules returns
    with torch.inference_mode():
        model(torch.tensor([TOKENS]), last_only=True)
    for handle in handles:
        handle.remove()
    run = run_case(model, TOKENS, level="modules").recording
    judged = [r for r in run if not r.site.startswith("rotary_emb")]
    found = forecast(Recording(run.header, judged), name)

    target = np.dtype(np.float16) if name == "float16" else np.dtype(getattr(ml_dtypes, name))
    info = ml_dtypes.finfo(target)
    values = np.concatenate([output.ravel() for output in outputs])
    with np.errstate(over="ignore"):
        cast = values.astype(target).astype(np.float64)
    assert found.elements == values.size
    assert found.past == (~np.isfinite(cast)).sum()
    assert found.zero == ((cast == 0) & (values != 0)).sum()
    assert found.subnormal == ((cast != 0) & (np.abs(cast) < float(info.smallest_normal))).sum()


@pytest.mark.slow
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_float16_breaks_where_a_float32_run_says(generation: int) -> None:
    """Down to the last bit of headroom and past it; where it holds, it holds."""
    broken = 0
    for exponent in range(4, 18):
        opened = random_checkpoint(SPECS[generation])
        found = forecast(run_case(stressed(opened, 2.0**exponent), TOKENS).recording, "float16")
        actual = run_case(stressed(opened, 2.0**exponent, dtype="float16"), TOKENS).recording.first_break()
        assert (None if found.first is None else found.first.site) == (None if actual is None else actual.site)
        broken += actual is not None
    assert 0 < broken < 14
