"""Factors between two projections: what is between them fits, and their result is that of the same change by hand."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from trials.by_hand import distance_of, far, in_float32, output
from trials.fused import FUSED, Fused, fused
from truth.decoders import AT, IDS
from truth.models import bert, decoder, new
from truth.plants import answer, rows_of

from stabilitykit.records.trials import Diagnosis
from stabilitykit.trials.diagnose import diagnose_run

VALUE, K = 80000.0, 2  # so many halvings bring it under the maximum with a bit to spare
SMALL = 2.0**-12  # of what reads values, so that rounding is not magnified
NAMES = {"query": "query and key factors", "value": "value and output factors"}

Change = Callable[[Any], None]


def t5() -> Any:
    config: Any = transformers.T5Config
    return transformers.T5EncoderModel(
        config(
            vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            attn_implementation="eager",
        )
    )  # fmt: skip


def made(name: str) -> Any:
    return new({"bert": bert, "t5": t5}[name]) if name in ("bert", "t5") else decoder(name)


def run(model: Any) -> Any:
    return model(IDS)


def times(linear: Any, factor: float, *, bias: bool = True) -> None:
    linear.weight.data *= factor
    if bias and linear.bias is not None:
        linear.bias.data *= factor


def cures(model: Any, name: str, change: Change, *, carried: bool = True, near: float = 0.02) -> Diagnosis:
    """`model` fails, and the trial of this name cures it as `change` does, which is made by hand."""
    expected = in_float32(run, model)
    assert far(output(run, model), expected) > 0.05  # T5 clamps, and is wrong; others are NaN
    by_hand = copy.deepcopy(model)
    change(by_hand)
    wanted = far(output(run, by_hand), expected)
    assert wanted < near
    found = diagnose_run(model, run)
    trial = found[name]
    assert trial.cured
    assert trial.carried == carried
    assert distance_of(trial).error_max == pytest.approx(wanted, rel=1e-3)
    exec(trial.command, {"model": model})
    assert far(output(run, model), expected) == pytest.approx(wanted, rel=1e-3)
    return found


Separate = tuple[str, str, str, str, str]
LAYER = "model.layers.1.self_attn"
BERT, T5 = "encoder.layer.1.attention", "encoder.block.1.layer.0.SelfAttention"
SEPARATE: dict[str, Separate] = {
    "llama": (LAYER, "q_proj", "k_proj", "v_proj", f"{LAYER}.o_proj"),
    "qwen2": (LAYER, "q_proj", "k_proj", "v_proj", f"{LAYER}.o_proj"),
    "phi": (LAYER, "q_proj", "k_proj", "v_proj", f"{LAYER}.dense"),
    "bert": (f"{BERT}.self", "query", "key", "value", f"{BERT}.output.dense"),
    "t5": (T5, "q", "k", "v", f"{T5}.o"),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_queries_that_overflow(name: str) -> None:
    attention, query, key, _, _ = SEPARATE[name]
    model = made(name)
    times(model.get_submodule(f"{attention}.{key}"), 2.0**-8)  # so that no score overflows where a query does
    answer(model, f"{attention}.{query}", run, {AT: VALUE})

    def change(model: Any) -> None:
        times(model.get_submodule(f"{attention}.{query}"), 2.0**-K)
        times(model.get_submodule(f"{attention}.{key}"), 2.0**K)

    found = cures(model.half(), "query and key factors", change)
    assert f"{attention}.{query}".removeprefix("model.") in found.verdict


@pytest.mark.parametrize("name", SEPARATE)
def test_values_that_overflow(name: str) -> None:
    attention, _, _, value, out = SEPARATE[name]
    model = made(name)
    times(model.get_submodule(out), SMALL)
    answer(model, f"{attention}.{value}", run, {AT: VALUE})

    def change(model: Any) -> None:
        times(model.get_submodule(f"{attention}.{value}"), 2.0**-K)
        times(model.get_submodule(out), 2.0**K, bias=False)

    found = cures(model.half(), "value and output factors", change)
    assert f"{attention}.{value}".removeprefix("model.") in found.verdict


def parts_times(model: Any, one: Fused, *by: float) -> None:
    """Multiplies queries, keys and values of a fused projection."""
    linear = model.get_submodule(one.path)
    for held in (rows_of(linear), linear.bias):
        for part, factor in zip(() if held is None else one.parts(held.data), by, strict=False):
            part.mul_(factor)


@pytest.mark.parametrize("name", FUSED)
def test_queries_of_a_fused_projection(name: str) -> None:
    one, model = FUSED[name], fused(name)
    parts_times(model, one, 1.0, 2.0**-8, 1.0)
    answer(model, one.path, run, {AT: VALUE})
    cures(model.half(), "query and key factors", lambda m: parts_times(m, one, 2.0**-K, 2.0**K, 1.0))


@pytest.mark.parametrize("name", FUSED)
def test_values_of_a_fused_projection(name: str) -> None:
    one, model = FUSED[name], fused(name)
    times(model.get_submodule(one.output), SMALL)
    answer(model, one.path, run, {AT: VALUE}, one.value)

    def change(model: Any) -> None:
        parts_times(model, one, 1.0, 1.0, 2.0**-K)
        times(model.get_submodule(one.output), 2.0**K, bias=False)

    cures(model.half(), "value and output factors", change)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an attribute by its old name
def test_a_fused_projection_below_an_adapter() -> None:
    one = FUSED["gpt2"]
    model = fused("gpt2")
    times(model.get_submodule(one.output), SMALL)
    answer(model, one.path, run, {AT: VALUE}, one.value)
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, lora_alpha=2, fan_in_fan_out=True)
    model = peft.get_peft_model(model, config).eval()
    path, out = f"base_model.model.{one.path}", f"base_model.model.{one.output}"
    adapted: Any = model.get_submodule(path)
    torch.nn.init.normal_(adapted.lora_B["default"].weight, std=0.01)

    def change(model: Any) -> None:
        below = model.get_submodule(path)
        for held in (rows_of(below.base_layer), below.base_layer.bias.data, below.lora_B["default"].weight.data):
            one.parts(held)[2].mul_(2.0**-K)
        times(model.get_submodule(out), 2.0**K, bias=False)

    cures(model.half(), "value and output factors", change)


def gain(model: Any, part: str) -> torch.Tensor:
    weight: torch.Tensor = model.get_submodule(f"{LAYER}.{part}_norm").weight.data
    return weight


def larger_gain(weight: torch.Tensor, factor: float, one: float) -> None:
    weight.copy_((weight.float() + one) * factor - one)


@pytest.mark.parametrize(("name", "one"), [("qwen3", 0.0), ("gemma3", 1.0)])
def test_queries_that_a_norm_makes_have_the_factor_in_its_gain(name: str, one: float) -> None:
    model = decoder(name).half()
    gain(model, "q")[0] = 60000.0
    gain(model, "k")[[0, 8]] = 2.0**-9 - one  # RoPE turns these two into each other: scores stay small

    def change(model: Any) -> None:
        larger_gain(gain(model, "q"), 2.0**-K, one)
        larger_gain(gain(model, "k"), 2.0**K, one)

    cures(model, "query and key factors", change)


@pytest.mark.parametrize(("name", "one"), [("qwen3", 0.0), ("gemma3", 1.0)])
def test_where_scores_overflow_too_the_factor_goes_to_their_scale(name: str, one: float) -> None:
    model = decoder(name).half()
    gain(model, "q")[0] = 60000.0
    k = 3

    def change(model: Any) -> None:
        larger_gain(gain(model, "q"), 2.0**-k, one)
        model.get_submodule(LAYER).scaling *= 2.0**k

    cures(model, "query and key factors", change, carried=False)


def scores_overflow(name: str, size: float, layer: str, query: str = "q_proj", key: str = "k_proj") -> Any:
    """Queries and keys of this size at one position."""
    model = made(name)
    for part in (query, key):
        answer(model, f"{layer}.{part}", run, {AT: size})
    return model.half()


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_scores_that_fit_once_they_are_scaled(name: str) -> None:
    first = LAYER.replace("1", "0")

    def change(model: Any) -> None:
        attention = model.get_submodule(first)
        times(attention.q_proj, 2.0**-K)
        attention.scaling *= 2.0**K

    cures(scores_overflow(name, 300.0, first), "query and key factors", change, carried=False)


def test_scores_that_do_not_fit_even_then_are_not_offered_it() -> None:
    found = diagnose_run(scores_overflow("llama", 3000.0, LAYER.replace("1", "0")), run)
    assert "even after they are scaled" in found.left_out["query and key factors"]
    assert found["float32 islands"].finite


def test_without_a_scale_nothing_takes_the_factor_of_scores() -> None:
    one, model = FUSED["falcon"], fused("falcon")
    for channel in (0, 16):  # of queries and keys of the first head
        answer(model, one.path, run, {AT: 300.0}, channel)
    found = diagnose_run(model.half(), run)
    assert "has no scale of its own" in found.left_out["query and key factors"]


def test_scores_that_become_minus_infinity_do_not_keep_keys_from_the_factor() -> None:
    query, key = (f"{T5.replace('1', '0', 1)}.{part}" for part in ("q", "k"))
    model = made("t5")
    answer(model, query, run, {AT: VALUE})
    answer(model, key, run, {0: -1.0, 1: 0.5})  # of one pair the score is -80,000, of another, which wins, 40,000

    def change(model: Any) -> None:
        times(model.get_submodule(query), 2.0**-K)
        times(model.get_submodule(key), 2.0**K)

    cures(model.half(), "query and key factors", change, near=0.1)


def test_each_layer_that_overflows_has_its_own_power() -> None:
    model = decoder("llama")
    for layer, wanted in ((0, 80000.0), (1, 300000.0)):
        model.get_submodule(f"model.layers.{layer}.self_attn.o_proj").weight.data *= SMALL
        answer(model, f"model.layers.{layer}.self_attn.v_proj", run, {AT: wanted})

    def change(model: Any) -> None:
        for layer, k in ((0, 2), (1, 4)):
            attention = model.model.layers[layer].self_attn
            attention.v_proj.weight.data *= 2.0**-k
            attention.o_proj.weight.data *= 2.0**k

    cures(model.half(), "value and output factors", change)
