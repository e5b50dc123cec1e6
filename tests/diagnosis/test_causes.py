"""Why a run broke and what to do about it, by origin and kind: every sentence whole."""

import math
from dataclasses import replace
from typing import Any

import pytest
from recordings import HEADER as FINITE
from recordings import broke, made

from stabilitykit.diagnosis import cause, verdict
from stabilitykit.records import Level, Recording, StoredWeights, WeightCounts

HEADER = replace(FINITE, lost_steps=(0,))

ATTENTION = "layers.0.self_attn"


# Without operators


@pytest.mark.parametrize("level", ["modules", "layers"])
def test_where_only_modules_were_seen_nothing_is_claimed(level: Level) -> None:
    record = made(2, "layers.0", label="residual after MLP", operator=None, nan=4, broke=broke("unresolved"))
    recording = Recording(replace(HEADER, level=level), [record])
    assert verdict(recording) == (
        "layer 0, residual after MLP (layers.0), at token 0 '<bos>', channel 2, is the first tensor that is not "
        f"finite. Why is not known: of {level} only what they return was recorded, and a value out of range, a mask, "
        "a weight and an operation without a finite result look alike from there. Record operators to see how."
    )


def test_an_operator_that_could_not_be_repeated_is_not_explained() -> None:
    record = made(2, "/scale.0", operator="scale", positive_inf=4, broke=broke("unresolved", value=None, operands=()))
    assert verdict(Recording(HEADER, [record])) == (
        "/scale.0, operator scale, at token 0 '<bos>', channel 2, is the first tensor that is not finite. How "
        "scale came to it was not seen: its result could not be computed again in a wider format. Run the same in "
        "float32: if it is finite there, this dtype is the reason."
    )


# What was there before any arithmetic


def weights(name: str = "layers.0.mlp.up_proj.weight", **changes: Any) -> StoredWeights:
    counts = {"overflow": 0, "subnormal": 0, "zero": 0, "nonfinite": 0} | {
        key: changes.pop(key) for key in ("overflow", "nonfinite") if key in changes
    }
    worst = WeightCounts(name=name, elements=8, **counts, **changes)
    return StoredWeights(dtype="float16", elements=80, worst=(worst,), **counts)


def of_origin(kind: Any, origin: Any, name: str | None, **header: Any) -> str:
    seen = broke(kind, origin_kind=origin, origin_name=name, origin_finite=False, operands=(), causal=False)
    return verdict(Recording(replace(HEADER, **header), [made(2, "/mul.0", operator="mul", nan=1, broke=seen)]))


FIRST = "/mul.0, operator mul, at token 0 '<bos>', channel 2, is the first tensor that is not finite"


def test_a_weight_that_only_the_dtype_does_not_hold() -> None:
    stored = weights(overflow=1, index=(7, 9), value=70_000.0)
    assert of_origin("weight", "weight", "layers.0.mlp.up_proj.weight", weights=stored) == (
        f"{FIRST}, because layers.0.mlp.up_proj.weight is not. Stored in float16, 1 weight overflows: "
        "layers.0.mlp.up_proj.weight[7, 9] is 70,000; the checkpoint itself is finite. Store the weights in a format "
        "with a wider range (bfloat16, float32)."
    )


def test_a_weight_that_is_not_finite_in_the_file() -> None:
    stored = weights(nonfinite=1, index=(7, 9), value=math.nan)
    assert of_origin("weight", "weight", "up_proj.weight", weights=stored) == (
        f"{FIRST}, because up_proj.weight is not. The weights were not finite to begin with: 1 of them is NaN or "
        "infinite in the checkpoint itself (layers.0.mlp.up_proj.weight[7, 9] is nan). Check how the checkpoint was "
        "written and cast; no number format helps."
    )


def test_a_quantised_block_whose_own_scale_is_not_finite() -> None:
    stored = weights(nonfinite=256, index=(1, 256), value=math.inf, block=5, block_size=256)
    told = of_origin("weight", "weight", "up_proj.weight", weights=stored)
    assert told.endswith(
        "256 of them are NaN or infinite in the checkpoint itself (layers.0.mlp.up_proj.weight[1, 256] is inf). They "
        "are in block 5 of 256 weights, whose own scale is not finite. Get the file again, or make it again from the "
        "original weights; no number format helps."
    )
    scale = of_origin("weight", "weight", "s", weights=weights("up_proj.weight_scale", nonfinite=1, role="scale"))
    assert "It is a scale that quantised weights are read with, so all of those are lost. Get the file again" in scale


def test_of_a_model_that_was_cast_it_is_not_said_that_no_format_helps() -> None:
    assert of_origin("weight", "weight", "up_proj.weight", checkpoint=None) == (
        f"{FIRST}, because up_proj.weight is not. The weights were not finite to begin with: up_proj.weight. The model "
        "was in float16 when this run began, so whether the checkpoint holds it so, or a cast to float16 (such as "
        ".half()) made it so, is not known. Look at it in the checkpoint: if it is finite there, load the model in a "
        "format that holds it; if not, no number format helps."
    )
    assert of_origin("weight", "weight", "w", dtype="float32").endswith(
        "The weights were not finite to begin with: w. Check how the checkpoint was written, loaded and changed before "
        "this run."
    )


def test_weights_beside_a_break_that_was_not_seen_may_be_the_reason() -> None:
    stored = weights(overflow=1, index=(7, 9), value=70_000.0)
    record = made(2, "layers.0", operator=None, nan=4, broke=broke("unresolved"))
    recording = Recording(replace(HEADER, level="layers", weights=stored), [record])
    assert verdict(recording).endswith(
        "Stored in float16, 1 weight overflows (layers.0.mlp.up_proj.weight[7, 9] is 70,000), which may be the reason; "
        "only a recording of operators shows whether it is. Record operators to see how."
    )


def test_a_buffer() -> None:
    assert of_origin("weight", "buffer", "big") == (
        f"{FIRST}, because the buffer big is not. Whether the buffer was made so or became so in a cast to float16 is "
        "not known. Look at how the model makes big: if its numbers are finite there, keep it in a format that holds "
        "them."
    )
    seen = broke("weight", origin_kind="buffer", origin_name="big", rounded_site="big", rounded_from=-1e30)
    recording = Recording(HEADER, [made(2, "/mul.0", operator="mul", nan=1, broke=seen)])
    assert verdict(recording).endswith(
        "The buffer big is not finite in float16 alone: it is -1e+30 in a wider format. Give it a value that float16 "
        "holds, or keep it in float32."
    )


@pytest.mark.parametrize(
    ("origin", "name", "said"),
    [
        (
            "input",
            "inputs_embeds",
            "because the input inputs_embeds is not. It was not finite before the model touched it. Check what is "
            "passed to the model.",
        ),
        (
            "cache",
            "past_key_values",
            "because past_key_values, a cache, is not. A cache that was passed to the model (past_key_values) was not "
            "finite before this step: a slot of it holds NaN or infinities, or was never written. Look at what writes "
            "into the cache, and mask the slots that nothing has been written to.",
        ),
        (
            "outside",
            "a tensor",
            "because what comes from outside the model is not. What code outside the model made was not finite before "
            "the model touched it. Look at that code: the model did not make it so.",
        ),
    ],
)
def test_inputs(origin: str, name: str, said: str) -> None:
    assert of_origin("input", origin, name) == f"{FIRST}, {said}"


@pytest.mark.parametrize(
    ("name", "said"),
    [("nan", "because of nan, which the code itself puts in"), ("full", "because of a constant that full made")],
)
def test_constants(name: str, said: str) -> None:
    assert of_origin("constant", "constant", name) == (
        f"{FIRST}, {said}. The model's own code puts it there; no arithmetic on the model's numbers made it. Look at "
        "that line of the model. If the number is finite where it is written, this dtype does not hold it."
    )


# No finite result


def invalid(operator: str, kind: Any = "invalid", site: str | None = None, **seen: Any) -> Recording:
    usual = {"operands": (0.0, 0.0), "operand_sites": ("/sub.0", "/add.0"), "value": math.nan, "causal": False}
    told: dict[str, Any] = usual | seen
    before = [made(0, "/sub.0", operator="sub"), made(1, "/add.0", operator="add")]
    return Recording(
        HEADER, [*before, made(2, site or f"/{operator}.0", operator=operator, nan=1, broke=broke(kind, **told))]
    )


def test_zero_divided_by_zero_of_what_was_computed_claims_no_more_than_that() -> None:
    assert verdict(invalid("div")) == (
        "/div.0, operator div, at token 0 '<bos>', channel 2, is NaN: 0 ÷ 0 = nan. div has no finite result for its "
        "finite operands (invalid), in any format. Whether a wider format would have given it these operands is not "
        "known. Look at its operands, and compare them with those of a run in a wider format."
    )


def test_of_what_was_given_no_format_helps() -> None:
    given = invalid("div", operand_sites=("x", "constant"), origin_kind="input")
    assert verdict(given).endswith("in any format. Look at its operands; a wider format will not help.")


@pytest.mark.parametrize(
    ("operator", "kind", "site", "was", "said"),
    [
        (
            "div",
            "division-by-zero",
            "constant",
            1e-8,
            "That is this dtype's rounding: a constant is 0 in float16 alone. In float32 it is 1e-08, and the result "
            "finite. Compute this in float32, or use an eps that float16 does not round to 0: its least number is "
            "6e-08.",
        ),
        (
            "log",
            "division-by-zero",
            "/softmax.0",
            2e-9,
            "That is this dtype's rounding: /softmax.0 is 0 in float16 alone. In float32 it is 2e-09, and the result "
            "finite. Compute this in float32, or use log_softmax.",
        ),
        (
            "sub",
            "invalid",
            "/mul.0",
            90_000.0,
            "That is this dtype's rounding: /mul.0 is infinite in float16 alone. In a wider format it is 90,000, and "
            "the result finite. Compute this in float32.",
        ),
    ],
)
def test_a_zero_that_only_this_dtype_made(operator: str, kind: Any, site: str, was: float, said: str) -> None:
    recording = invalid(operator, kind, rounded_site=site, rounded_from=was)
    found = cause(recording)
    assert found is not None
    assert found.name == "rounding"
    assert verdict(recording).endswith(said)
    assert "in any format" not in verdict(recording)


def test_a_loss_over_labels_that_are_all_ignored() -> None:
    loss = invalid("nll_loss_forward", operands=(6.0,), operand_sites=("/log_softmax.0",))
    assert verdict(loss).endswith(
        "The loss is a mean over no labels, 0 / 0: every label is one that the loss ignores (-100), in any format. "
        "Look at the labels of this batch; at least one must count."
    )
    line = invalid("div", site="outside/div.0", outside="train.py:31: loss = total / count")
    assert verdict(line) == (
        "What is made outside the model, in train.py:31: loss = total / count (operator div), at token 0 '<bos>' is "
        "NaN: 0 ÷ 0 = nan. The loss is 0 / 0, a mean over nothing, in any format. Look at the labels of this batch; "
        "at least one must count."
    )


def test_the_mean_of_nothing() -> None:
    assert verdict(invalid("mean", operands=(), operand_sites=())).endswith(
        "It is the mean of no elements, 0 / 0, in any format. Look at what is averaged: a tensor without elements, "
        "such as the tokens of an expert that got none."
    )


# Masks


def masked(**seen: Any) -> Recording:
    usual = {"operands": (math.inf,), "value": math.nan, "positions": (0, 1, 2), "causal": False}
    told: dict[str, Any] = usual | seen
    row = made(2, f"{ATTENTION}/softmax.0", operator="softmax", nan=9, broke=broke("masked-row", **told))
    return Recording(HEADER, [row])


def test_a_row_that_sees_nothing() -> None:
    assert verdict(masked()) == (
        "layer 0, layers.0.self_attn/softmax.0, operator softmax, at tokens 0 to 2 is NaN: every key of that row is "
        "masked. A row of the attention mask hides every key (-inf throughout), and the softmax of such a row is 0 / "
        "0, in any dtype. Every number before the mask is in range. Let each position see at least itself, whatever "
        "padding or a sliding window hides from it, or use a finite number in place of -inf, such as half of the "
        "dtype's minimum."
    )


def test_a_row_that_only_this_dtype_empties() -> None:
    told = verdict(masked(rounded_site=f"{ATTENTION}/add.2", rounded_from=-65_554.0))
    assert told.endswith(
        "The mask alone does not hide every key of that row: in layers.0.self_attn/add.2 score and mask add up to less "
        "than the float16 minimum (-65,554) and become -inf, in this dtype only, and the softmax of a row of -inf is "
        "0 / 0. Give masked positions half of the dtype's minimum, or pass a boolean mask."
    )
    assert "in any dtype" not in told
    assert "dtype's minimum in place of" not in told


# Outside the model


def outside(kind: Any, told: str | None, operator: str = "mul", **seen: Any) -> Recording:
    usual = {"operands": (0.72, 1e6), "value": 722_656.0, "position": 0, "causal": False}
    changes: dict[str, Any] = usual | seen
    record = made(3, f"outside/{operator}.0", operator=operator, nan=1, broke=broke(kind, outside=told, **changes))
    return Recording(HEADER, [made(0, "lm_head"), replace(record, module="outside")])


def test_the_users_own_line_is_named() -> None:
    assert verdict(outside("overflow", "train.py:31: loss = model(x).sum() * 1e6")) == (
        "float16 overflows outside the model, in train.py:31: loss = model(x).sum() * 1e6 (operator mul), at token 0 "
        "'<bos>': 0.72 · 1,000,000 = 722,656 exceeds the float16 maximum, 65,504. The logits are finite; what "
        "follows is not the model's. Compute this in float32, which holds the value."
    )
    divided = outside("invalid", "train.py:7: z / z", "div", operands=(0.0, 0.0), value=math.nan)
    assert verdict(divided).endswith(
        "0 ÷ 0 = nan. The logits are finite; what follows is not the model's. Look at its operands: 0 and 0."
    )
    assert "temperature" not in verdict(divided) + verdict(outside("overflow", None))
    assert "top_p" not in verdict(divided) + verdict(outside("invalid", None, value=math.nan))


def test_a_logits_processor_that_leaves_no_token_is_named() -> None:
    recording = outside("masked-row", "SuppressTokensLogitsProcessor", "softmax", operands=(math.inf,), value=math.nan)
    assert verdict(recording) == (
        "Outside the model, in SuppressTokensLogitsProcessor (operator softmax), at token 0 '<bos>', the scores are "
        "not finite. The logits are finite. SuppressTokensLogitsProcessor left no token: every score is -inf, and a "
        "softmax of that is 0 / 0. Greedy decoding raises nothing and takes token 0. That is a setting of "
        "generate(), whatever the dtype: let the processors leave at least one token."
    )
    tiny = outside("overflow", "TemperatureLogitsWarper", "div", operands=(12.0, 1e-4), value=120_000.0)
    tiny.header = replace(HEADER, case={"temperature": 1e-4})
    assert verdict(tiny).endswith(
        "The logits are finite. TemperatureLogitsWarper divides them by the temperature, 0.0001, and they overflow "
        "float16; in float32 they would not. Use greedy decoding instead of a tiny temperature, or divide in float32."
    )


def test_gradients_are_seen_after_the_backward_pass() -> None:
    names = ("lm_head.weight", "norm.weight", "embed_tokens.weight")
    seen = broke("unresolved", outside="backward", operands=(), value=None, position=0)
    records = [
        made(5 + n, f"backward/{name}", operator=None, positive_inf=1, broke=replace(seen, position=None))
        for n, name in enumerate(names)
    ]
    assert verdict(Recording(HEADER, [made(0, "lm_head"), *records])) == (
        "After the backward pass the gradients of lm_head.weight and 2 other parameters are not finite (1 element). "
        "Everything before that, the loss included, was finite. Which operator of the backward pass made it so was not "
        "recorded: `record(model, backward=True)` does. `sk.diagnose_training(make)` runs the step "
        "and tries what helps. Use a smaller loss scale, or run the backward pass in a format with a wider range "
        "(bfloat16, float32)."
    )


@pytest.mark.parametrize(("case", "name"), [({}, "invalid-operation"), ({"top_k": 0}, "top-k"), ({"top_p": 0.9}, None)])
def test_the_kits_own_sampler_is_blamed_only_for_its_own_settings(case: dict[str, Any], name: str | None) -> None:
    record = made(
        2, "sampler/div.1", operator="div", nan=1, broke=broke("invalid", operands=(0.0, 0.0), value=math.nan)
    )
    found = cause(Recording(replace(HEADER, case=case), [record]))
    assert found is not None
    assert found.name == (name or "invalid-operation")
    assert "None" not in found.sentence + found.remedy
