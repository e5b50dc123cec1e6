"""What became of a break: reached, absorbed, harmlessly or not, on records made by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
from recordings import HEADER, broke, made

from stabilitykit.diagnosis import cause, chain, document, is_finite, verdict
from stabilitykit.diagnosis.outcome import decisive, is_harmless, outcome
from stabilitykit.records import Level, Record, Recording


def overflow(site: str = "layers.0.self_attn/matmul.0", operator: str = "matmul", **changes: Any) -> Record:
    """One element past the maximum, +inf unless it is said otherwise."""
    lost = {"positive_inf": 1} if "negative_inf" not in changes else {}
    seen = broke(**{"operands": (300.0, 310.0), "value": 93_000.0, "positions": (0,)} | changes.pop("seen", {}))
    return made(2, site, operator=operator, lost_positions=1, lost_channels=1, broke=seen, **lost, **changes)


def run(*records: Record, **changes: Any) -> Recording:
    return Recording(replace(HEADER, **changes), [made(0, "embed_tokens"), *records, made(90, "lm_head")])


def absorbs(operator: str, site: str | None = None, order: int = 3, **changes: Any) -> Record:
    return made(order, site or f"layers.0.self_attn/{operator}.0", operator=operator, absorbs=True, **changes)


def harmless(*records: Record) -> bool | None:
    found = outcome(run(*records))
    assert found is not None
    assert found.name == "absorbed"
    return found.harmless


def test_nothing_broke() -> None:
    assert outcome(run()) is None
    assert decisive(run()) is None
    assert not is_harmless(run())


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ({"lost_steps": (0,)}, "reached"),
        ({"lost_steps": (3,)}, "reached"),
        ({"error": "not a probability"}, "reached"),
        ({}, "absorbed"),
    ],
)
def test_what_came_out_of_the_model_says_whether_a_break_reached_it(header: dict[str, Any], name: str) -> None:
    recording = run(overflow(), absorbs("div"), **header)
    found = outcome(recording)
    assert found is not None
    assert found.name == name
    assert document(recording)["first_break"]["outcome"] == name


def test_of_an_earlier_step_it_says_nothing() -> None:
    later = replace(overflow(), step=1)
    recording = Recording(replace(HEADER, lost_steps=(0,)), [later, replace(absorbs("div"), step=1)])
    found = outcome(recording)
    assert found is not None
    assert found.name == "absorbed"


def test_of_a_recording_that_does_not_know_what_came_out_the_logits_decide() -> None:
    old = replace(overflow(), broke=replace(broke(), positions=()))
    head = made(9, "lm_head", nan=12)
    assert outcome(Recording(HEADER, [old, head])).name == "reached"
    assert outcome(Recording(HEADER, [old, made(9, "lm_head")])).name == "none"


@pytest.mark.parametrize("level", ["modules", "layers"])
def test_where_only_modules_were_seen_nothing_is_absorbed(level: str) -> None:
    recording = run(overflow("layers.0", seen={"kind": "unresolved"}), absorbs("div"), level=level)
    found = document(recording)["first_break"]
    assert (found["outcome"], found["absorbed_at"], found["absorbed_by"], found["harmless"]) == ("none",) + 3 * (None,)
    assert "absorbed" not in verdict(recording)
    assert "What the model returns is finite all the same." in verdict(recording)


def test_the_first_operator_that_ends_it_is_named() -> None:
    found = document(run(overflow(), absorbs("div", order=3), absorbs("tanh", order=4)))["first_break"]
    assert (found["absorbed_at"], found["absorbed_by"]) == ("layers.0.self_attn/div.0", "div")


def test_what_the_damage_goes_past_does_not_end_it() -> None:
    """In a norm 1 / √inf is 0, and inf · 0 is NaN; what ends it is the repair of the logits."""
    norm = "layers.1.input_layernorm"
    records = [
        overflow("layers.0", operator="add"),
        made(3, f"{norm}/mean.0", operator="mean", positive_inf=1),
        absorbs("rsqrt", f"{norm}/rsqrt.0", order=4),
        made(5, f"{norm}/mul.0", operator="mul", nan=1),
        absorbs("nan_to_num", "/nan_to_num.0", order=6),
    ]
    found = document(run(*records))["first_break"]
    assert (found["absorbed_at"], found["harmless"]) == ("/nan_to_num.0", False)


def test_what_is_lost_to_the_end_was_not_absorbed() -> None:
    begun = [overflow("layers.0", operator="add"), absorbs("rsqrt", order=3)]
    for end, outcome_of_it in (("pooler", "none"), ("model.lm_head", "reached")):
        recording = Recording(HEADER, [*begun, made(4, end, nan=12)])
        assert document(recording)["first_break"]["outcome"] == outcome_of_it


@pytest.mark.parametrize("operator", ["tanh", "sigmoid", "erf", "atan"])
def test_what_is_flat_at_infinity_gives_the_true_value_its_end(operator: str) -> None:
    assert harmless(overflow(), absorbs(operator, amax=1.0)) is True


@pytest.mark.parametrize("operator", ["exp", "relu", "softmax", "sigmoid", "tanh", "amax"])
def test_so_does_what_is_flat_at_minus_infinity(operator: str) -> None:
    assert harmless(overflow(negative_inf=1), absorbs(operator, amax=1.0)) is True


@pytest.mark.parametrize("operator", ["div", "reciprocal", "rsqrt", "pow", "nan_to_num"])
def test_what_is_made_of_infinity_is_not_what_the_true_value_gives(operator: str) -> None:
    assert harmless(overflow(), absorbs(operator)) is False


def test_a_cast_to_float8_that_saturates_changes_the_value() -> None:
    saturated = absorbs("cast", dtype="float8_e4m3fn", amax=448.0)
    assert harmless(overflow(), saturated) is False
    assert "the cast to float8_e4m3fn makes 448 of infinity" in verdict(run(overflow(), saturated))
    assert harmless(overflow(), absorbs("cast", dtype="float32")) is None


@pytest.mark.parametrize(("bound", "same"), [(50.0, True), (64504.0, False), (65504.0, False), (50000.0, None)])
def test_a_clamp_near_the_formats_maximum_is_there_because_of_the_format(bound: float, same: bool | None) -> None:
    """T5 clamps to 1,000 below the maximum where it finds an infinity, and in float32 it does not clamp."""
    assert harmless(overflow(), absorbs("clamp", amax=bound, maximum=bound)) is same


@pytest.mark.parametrize("operator", ["where", "masked_fill", "index_select", "some_operator"])
def test_of_what_chooses_or_is_not_known_nothing_is_claimed(operator: str) -> None:
    assert harmless(overflow(), absorbs(operator)) is None


def test_zeros_exactly_where_something_was_lost_are_a_repair_and_no_mask() -> None:
    assert harmless(overflow(), absorbs("where", zero=1)) is False
    row = replace(overflow(), positive_inf=4, lost_channels=4)
    assert harmless(row, absorbs("where", zero=4)) is None  # a whole position, as a mask would take it


def scaled(order: int, operator: str, by: float, lost: int = 1, **changes: Any) -> Record:
    return made(
        order, f"layers.0.self_attn/{operator}.{order}", operator=operator, positive_inf=lost, amax=8.0 * by, rms=by,
        minimum=-8.0 * by, maximum=by, **changes,
    )  # fmt: skip


def test_a_scale_on_the_way_counts() -> None:
    """Of at least 65,504, a hundredth is far past the point where tanh is 1, and a millionth is not."""
    assert harmless(overflow(), scaled(3, "mul", 0.25), scaled(4, "div", 0.02 * 0.25), absorbs("tanh", order=5)) is True
    assert harmless(overflow(), scaled(3, "mul", 1e-6), absorbs("tanh", order=5)) is None
    small = overflow(seen={"scaled": 0.093})
    assert harmless(small, scaled(3, "mul", 0.25), absorbs("tanh", order=5)) is None  # as the record itself says


def test_what_the_way_does_to_it_is_known_or_nothing_is_claimed() -> None:
    unequal = replace(scaled(3, "mul", 0.25), rms=1.0)  # not by one number
    assert harmless(overflow(), unequal, absorbs("tanh", order=5)) is None
    assert harmless(overflow(), scaled(3, "sin", 1.0), absorbs("tanh", order=5)) is None
    assert harmless(overflow(), scaled(3, "mul", 0.25, lost=2), absorbs("tanh", order=5)) is None


def test_mish_is_right_though_its_exponential_overflows() -> None:
    """h · tanh(log(1 + exp(h))) for h = 21: exp is infinite, and tanh of log(65,505) is already 1."""
    exp = overflow("/exp.0", operator="exp", seen={"operands": (20.9,), "value": 1.18e9})
    ways = [scaled(3, "add", 1.0), scaled(4, "log", 0.01)]
    recording = run(exp, *ways, absorbs("tanh", "/tanh.0", order=5))
    assert is_harmless(recording)
    assert verdict(recording) == (
        "float16 overflows in /exp.0, operator exp, at token 0 '<bos>', channel 2: exp of 20.9 gives 1.18e+09, "
        "which exceeds the float16 maximum, 65,504. It is absorbed in /tanh.0, operator tanh: tanh of infinity is 1, "
        "as it is of the true value, so nothing is lost."
    )


@pytest.mark.parametrize(("operand", "same"), [(20.0, True), (12.0, None)])
def test_one_divided_by_what_grows_as_exp_does_may_be_0_in_any_case(operand: float, same: bool | None) -> None:
    """1 / (1 + exp(20)) is 2e-9, which float16 rounds to 0; 1 / (1 + exp(12)) it does not."""
    everything: dict[str, Any] = {"positive_inf": 12, "lost_positions": 3, "lost_channels": 4}
    nothing_finite: dict[str, Any] = dict.fromkeys(("amax", "rms", "minimum", "maximum", "mean"))
    seen = broke(operands=(operand,), operand_sites=("/neg.0",), count=12, value=math.exp(operand))
    exp = made(2, "/exp.0", operator="exp", broke=seen, **everything, **nothing_finite)
    added = made(3, "/add.0", operator="add", **everything, **nothing_finite)
    of = made(1, "/neg.0", operator="neg", minimum=operand)
    assert harmless(of, exp, added, absorbs("reciprocal", "/reciprocal.0", order=4)) is same
    assert harmless(of, exp, added, absorbs("div", "/div.0", order=4)) is None  # by what is not known


@pytest.mark.parametrize(
    ("kind", "changes", "same"),
    [
        ("division-by-zero", {}, True),  # an exact infinity
        ("division-by-zero", {"rounded_site": "constant", "rounded_from": 1e-8}, None),
        ("reduction", {"value": 12.0}, True),
        ("reduction", {"value": 2.0}, None),
        ("reduction", {"value": 12.0, "count": 2}, None),
        ("weight", {}, None),
        ("constant", {}, None),
    ],
)
def test_what_the_true_value_is_depends_on_the_kind(kind: Any, changes: dict[str, Any], same: bool | None) -> None:
    assert harmless(overflow(seen={"kind": kind, **changes}), absorbs("tanh", amax=1.0)) is same


def test_nan_on_the_way_is_never_harmless() -> None:
    nan = made(3, "layers.0/sub.0", operator="sub", nan=1)
    assert harmless(overflow(), nan, absorbs("nan_to_num", order=4)) is False
    assert harmless(overflow(), nan, absorbs("max", order=4)) is None


def test_one_way_on_which_it_does_harm_is_enough() -> None:
    assert harmless(overflow(), absorbs("tanh", amax=1.0), absorbs("div", order=4)) is False
    assert harmless(overflow(), absorbs("tanh", amax=1.0), absorbs("where", order=4)) is None


NORM = "encoder.layers.1.self_attn_layer_norm"


def spelled_out_norm() -> Recording:
    square = overflow(f"{NORM}/mul.0", operator="mul", layer=1, seen={
        "operands": (787.0, 787.0), "operand_sites": (f"{NORM}/sub.0", f"{NORM}/sub.0"), "value": 619_369.0,
        "counts": "frame", "position": 2, "positions": (2,), "token": None, "causal": False,
    })  # fmt: skip
    mean = made(3, f"{NORM}/mean.0", operator="mean", positive_inf=1, layer=1)
    divided = absorbs("div", f"{NORM}/div.0", order=4, layer=1)
    return run(square, mean, divided, tokens=None, token_texts={})


def test_a_number_divided_by_infinity_is_finite_and_wrong() -> None:
    recording = spelled_out_norm()
    assert verdict(recording) == (
        f"float16 overflows in layer 1, {NORM}/mul.0, operator mul, at frame 2, channel 2: 787 · 787 = 619,369 exceeds "
        f"the float16 maximum, 65,504. It is absorbed in layer 1, {NORM}/div.0, operator div: a number divided by "
        "infinity is 0. What the model returns is finite, and wrong: it is computed from that. Use a format with a "
        "wider range (bfloat16, float32). A candidate, not tried: compute this norm in float32, squares and their "
        "mean included. To try it on this input, and whatever else may help: `stabilitykit diagnose toy --prompt ...`."
    )
    found = document(recording)
    assert found["finite"] is True
    assert found["cause"] == "range"
    first = found["first_break"]
    assert (first["outcome"], first["absorbed_by"], first["harmless"]) == ("absorbed", "div", False)
    assert first["absorbed_at"] == f"{NORM}/div.0"
    assert [(link.event, link.site) for link in chain(recording)] == [
        ("break", f"{NORM}/mul.0"),
        ("absorbed", f"{NORM}/div.0"),
    ]


def test_a_harmless_overflow_is_no_alarm() -> None:
    recording = run(overflow(), absorbs("tanh", amax=1.0, label="tanh of the attention scores"), starts=(0,))
    assert verdict(recording).endswith(
        "It is absorbed in layer 0, tanh of the attention scores (layers.0.self_attn/tanh.0, operator tanh): tanh of "
        "infinity is 1, as it is of the true value, so nothing is lost."
    )
    why = cause(recording)
    assert why is not None
    assert (why.name, why.remedy) == ("harmless", "")
    assert is_finite(recording)


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    assert (
        verdict(run(overflow(), absorbs("where")))
        .partition("It is absorbed")[2]
        .startswith(
            " in layer 0, layers.0.self_attn/where.0, operator where: another number is put in its place. What the "
            "model returns is finite; whether it is right only a run in a wider format shows."
        )
    )


def test_the_break_that_does_harm_is_told_and_not_a_harmless_one_before_it() -> None:
    """A soft-cap ends an overflow in layer 0; what reaches the logits comes from layer 1."""
    second = made(
        20, "layers.1", label="residual after MLP", positive_inf=1, lost_positions=1, broke=broke(positions=(0,))
    )
    records = [overflow(), absorbs("tanh", amax=1.0), made(4, "layers.0"), second, made(21, "norm", nan=4)]
    recording = run(*records, lost_steps=(0,))
    found = outcome(recording)
    assert found is not None
    assert (found.name, found.harmless) == ("absorbed", True)
    assert decisive(recording).broke is second
    said = verdict(recording)
    assert said.startswith(
        "Overflows in layer 0, layers.0.self_attn/matmul.0, operator matmul end without loss. float16 overflows in "
        "layer 1, residual after MLP (layers.1, operator add), at token 0 '<bos>', channel 2: 60,000 + 8,000 = 68,000"
    )
    assert said.endswith("or scale the residual stream down by a power of two.")
    assert document(recording)["first_break"]["site"] == "layers.0.self_attn/matmul.0"
    assert document(recording)["cause"] == "range"
    two = run(overflow(), absorbs("div"), made(4, "layers.0"), second, lost_steps=(0,))
    assert outcome(two).name == "reached"  # what is wrong may have made the second


def test_a_soft_cap_after_the_head_leaves_the_logits_finite() -> None:
    head = replace(overflow("lm_head", layer=None), order=2, label="logits")
    capped = [
        made(3, "/div.0", operator="div", positive_inf=1, amax=0.16, rms=1 / 50),
        absorbs("tanh", "/tanh.0", order=4, amax=1.0),
        made(5, "/mul.0", operator="mul"),
    ]
    recording = Recording(HEADER, [head, *capped])
    assert is_finite(recording)
    assert "logits are infinite" not in verdict(recording)
    outer = Recording(replace(HEADER, level="layers"), [replace(head, broke=broke("unresolved", positions=(0,)))])
    assert is_finite(outer)
    assert "infinite" not in verdict(outer)
    lost = Recording(replace(HEADER, level="layers", lost_steps=(0,)), outer.records)
    assert not is_finite(lost)
    assert "1 logit is infinite" in verdict(lost)


def test_a_model_that_returns_nan_is_never_called_finite() -> None:
    seen = run(lost_steps=(0,))
    assert verdict(seen) == (
        "What the model returned is not finite in float16, and no operator or module that was recorded made it so: how "
        "it came about was not seen."
    )


@pytest.mark.parametrize(("level", "what"), [("modules", "module"), ("layers", "layer")])
def test_finite_throughout_says_what_was_not_seen(level: Level, what: str) -> None:
    said = verdict(Recording(replace(HEADER, level=level), [made(0, "layers.0")]))
    assert said.endswith(
        f" Only what each {what} returns was recorded: an overflow inside one that ends there again (x / inf = 0, a "
        "clamp, tanh, a softmax) cannot be excluded. Record operators to see it."
    )
    assert "Only what" not in verdict(Recording(HEADER, [made(0, "layers.0")]))


def test_a_value_that_even_float64_does_not_hold_is_still_a_bound() -> None:
    assert harmless(overflow(seen={"value": math.inf}), absorbs("tanh", amax=1.0)) is True
