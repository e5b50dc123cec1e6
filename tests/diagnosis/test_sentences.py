"""Where a break is and which prompts it happens to, in whole sentences."""

from dataclasses import replace
from typing import Any

import pytest
from recordings import HEADER, broke, made

from stabilitykit.diagnosis import by_layer, chain, verdict
from stabilitykit.diagnosis.logits import logits_of
from stabilitykit.records import Record, Recording
from stabilitykit.records.layers import is_layer, layer_of

RESIDUAL = "float16 overflows in layer 0, residual after MLP (layers.0, operator add)"


def said(record: Record, **header: Any) -> str:
    return verdict(Recording(replace(HEADER, **header), [record]))


def residual(**seen: Any) -> Record:
    return made(2, "layers.0", label="residual after MLP", positive_inf=1, broke=broke(**seen))


BATCH: dict[str, Any] = {"rows": 3, "tokens": ((2, 7, 9), (2, 9, 9), (2, 7, 7))}


@pytest.mark.parametrize(
    ("seen", "header", "place"),
    [
        ({}, {}, ", at token 0 '<bos>', channel 2: "),
        ({"positions": (0,)}, {}, ", at token 0 '<bos>', channel 2: "),
        ({"positions": (0, 1, 2)}, {}, ", at tokens 0 to 2, channel 2: "),
        ({"positions": (0, 2)}, {}, ", at token 0 '<bos>' and 1 more, channel 2: "),
        ({"positions": (0, 2), "rows": (0,)}, BATCH, ", at token 0 '<bos>' and 1 more of row 0, channel 2: "),
        ({"positions": (0, 1), "rows": (1,), "row": 1}, BATCH, ", at tokens 0 to 1 of row 1, channel 2: "),
        ({"positions": (0, 1), "rows": (0, 2)}, BATCH, ", at tokens 0 to 1, in rows 0 and 2, channel 2: "),
        ({"positions": (0,), "rows": (0, 1, 2)}, BATCH, ", at token 0 '<bos>', in all 3 rows, channel 2: "),
        ({"counts": "frame", "token": None, "positions": (0, 1)}, {}, ", at frames 0 to 1, channel 2: "),
        ({"counts": "patch", "token": None, "positions": (0,)}, {}, ", at patch 0, channel 2: "),
        ({"counts": "position", "token": None}, {}, ", at position 0, channel 2: "),
        ({"position": None, "token": None, "row": None}, {}, ", channel 2: "),
    ],
)
def test_all_positions_and_rows_are_named(seen: dict[str, Any], header: dict[str, Any], place: str) -> None:
    position = seen.pop("position", 0)
    record = residual(**seen)
    if position is None:
        record = replace(record, broke=replace(broke(**seen), position=None))
    assert said(record, **header).startswith(f"{RESIDUAL}{place}60,000 + 8,000 = 68,000")


def test_the_channel_is_named_where_the_last_axis_counts_channels() -> None:
    assert said(residual()).startswith(f"{RESIDUAL}, at token 0 '<bos>', channel 2: ")
    several = replace(residual(positions=(0, 1)), lost_channels=3)
    assert said(several).startswith(f"{RESIDUAL}, at tokens 0 to 1, first in channel 2: ")
    nan = made(2, "layers.0.mlp/div.0", operator="div", nan=1, broke=broke("invalid", value=float("nan")))
    assert said(nan).startswith("layer 0, layers.0.mlp/div.0, operator div, at token 0 '<bos>', channel 2, is NaN")
    for keys in (scores((1, 4, 3, 3), (0, 3, 0, 0)), scores((4, 3, 3), (2, 0, 0)), scores((1, 4, 1, 3), (0, 3, 0, 2))):
        assert "channel" not in verdict(keys).partition("In layer")[0]
    for site in ("lm_head", "sampler/div.0", "outside/mul.0"):
        assert "channel" not in said(made(2, site, positive_inf=1, broke=broke()))
    convolved = made(2, "encoder.conv", operator="convolution", positive_inf=1, broke=broke(counts="frame", token=None))
    assert "channel" not in said(convolved)


def test_a_generated_token_is_called_that() -> None:
    record = replace(residual(position=2, positions=(2,)), step=2)
    assert ", at token 2 '.', the 2nd token generated, channel 2: " in said(record, starts=(0, 1, 2))


DEPENDS = "This depends only on"


def test_which_prompts_break_alike_is_said_where_it_was_checked() -> None:
    assert f"{DEPENDS} the first token, <bos>: every prompt that starts with it overflows here." in said(residual())
    assert DEPENDS not in said(residual(causal=False))
    assert f"{DEPENDS} the first 3 tokens" in said(residual(position=2))


@pytest.mark.parametrize("kind", ["invalid", "division-by-zero", "masked-row", "weight", "input", "unresolved"])
def test_nothing_else_than_an_overflow_is_called_one(kind: Any) -> None:
    assert DEPENDS not in said(residual(kind=kind))


def test_padding_is_no_beginning_of_a_prompt() -> None:
    padded: dict[str, Any] = {"rows": 2, "tokens": ((0, 0, 7), (2, 7, 9))}
    record = residual(token=0)
    assert DEPENDS not in said(record, **padded)
    assert DEPENDS not in said(record, case={"left_padding": 1})
    assert f"{DEPENDS} the first token (id 0)" in said(record, tokens=((0, 7, 9),))  # a prompt that begins with it
    both: dict[str, Any] = {"rows": 2, "tokens": ((2, 7, 9), (2, 9, 9))}
    assert f"{DEPENDS} the first token, <bos>" in said(residual(), **both)


def test_which_tokens_an_expert_gets_may_depend_on_all_of_them() -> None:
    experts = made(2, "layers.1.mlp.experts/matmul.1", operator="matmul", positive_inf=1, broke=broke())
    assert DEPENDS not in said(experts)


def test_frames_and_patches_are_no_prompt() -> None:
    assert DEPENDS not in said(residual(counts="frame", token=None))


def scores(shape: tuple[int, ...], index: tuple[int, ...], **changes: Any) -> Recording:
    product = made(
        2, "layers.0.self_attn/matmul.0", operator="matmul", positive_inf=1, shape=shape,
        broke=broke(index=index, operands=(40.7, 40.7), value=76_611.0, causal=False, **changes),
    )  # fmt: skip
    after = [
        made(3, "layers.0.self_attn/mul.0", operator="mul", positive_inf=1),
        made(4, "layers.0.self_attn/softmax.0", operator="softmax", nan=1),
    ]
    return Recording(HEADER, [product, *after, made(5, "layers.0.self_attn/matmul.1", operator="matmul", nan=1)])


def test_the_head_is_named_by_the_index() -> None:
    assert "layers.0.self_attn/matmul.0, operator matmul, head 3, at token 0" in verdict(
        scores((1, 4, 3, 3), (0, 3, 0, 0))
    )
    assert "operator matmul, head 2, at token 0" in verdict(scores((4, 3, 3), (2, 0, 0)))
    two = scores((8, 3, 3), (6, 0, 0))
    two.header = replace(HEADER, rows=2, tokens=((2, 7, 9), (2, 7, 9)))
    assert "operator matmul, head 2, at token 0" in verdict(two)
    assert "head" not in verdict(scores((3, 3), (0, 0))).partition("In layer")[0]


def test_the_expert_is_named_by_its_path() -> None:
    record = made(2, "layers.1.mlp.experts.3.down_proj", operator="matmul", positive_inf=1, broke=broke(causal=False))
    assert "(layers.1" not in said(record)
    assert "operator matmul, expert 3, at token 0" in said(record)


@pytest.mark.parametrize(
    ("operator", "operands", "value", "arithmetic"),
    [
        ("add", (60000.0, 8000.0), 68000.0, "60,000 + 8,000 = 68,000 exceeds"),
        ("add", (-60000.0, -8000.0), -68000.0, "-60,000 + (-8,000) = -68,000 exceeds"),
        ("sub", (-60000.0, 60000.0), 120000.0, "60,000 - (-60,000) = 120,000 exceeds"),  # 60000 - x
        ("add", (30000.0, 30000.0), 120000.0, "add of 30,000 and 30,000 gives 120,000, which exceeds"),  # alpha=3
        ("mul", (787.0, 787.0), 619369.0, "787 · 787 = 619,369 exceeds"),
        ("div", (1000.0, 0.01), 100000.0, "1,000 ÷ 0.01 = 100,000 exceeds"),
        ("exp", (20.9,), 1.195e9, "exp of 20.9 gives 1.195e+09, which exceeds"),
        ("cast", (-200000.0,), -200000.0, "-200,000 exceeds"),
        ("matmul", (346.0, 260.0), 89981.0, "matmul of operands up to 346 and 260 gives 89,981, which exceeds"),
        ("my_op", (), None, "my_op gives a value that could not be recomputed, which exceeds"),
    ],
)
def test_the_arithmetic_that_is_printed_is_true(
    operator: str, operands: tuple[float, ...], value: float | None, arithmetic: str
) -> None:
    record = made(2, "layers.0/x", operator=operator, positive_inf=1, broke=broke(operands=operands, value=value))
    assert f": {arithmetic} the float16 maximum, 65,504." in said(record)


def test_errors_are_shown_by_their_first_line() -> None:
    recording = Recording(replace(HEADER, error="invalid values:\ntensor([[nan, nan]])"), [residual()])
    assert "Sampling raises: invalid values." in verdict(recording)
    assert "tensor" not in verdict(recording)
    assert chain(recording)[-1].text == "invalid values"


def test_what_greedy_decoding_takes_of_infinities_is_no_argmax_of_nan() -> None:
    header = replace(HEADER, case={"greedy_text": "<pad>"})
    infinite = Recording(header, [residual(), made(9, "lm_head", positive_inf=12)])
    assert "Greedy decoding raises nothing and prints <pad>, the first infinite logit." in verdict(infinite)
    assert "Every logit is infinite." in verdict(infinite)
    nan = Recording(header, [residual(), made(9, "lm_head", nan=12)])
    assert "prints <pad>, the argmax of NaN." in verdict(nan)


# Layers and logits under other names


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("layers.7", ("layers", 7)),
        ("layers.7.mlp.down_proj", ("layers", 7)),
        ("encoder.block.1.layer.0.SelfAttention", ("encoder.block", 1)),
        ("encoder.layer.11.attention.self", ("encoder.layer", 11)),
        ("transformer.h.3", ("transformer.h", 3)),
        ("model.language_model.layers.0", ("model.language_model.layers", 0)),
        ("conv_layers.0", None),
        ("layer1.0", None),
        ("norm", None),
    ],
)
def test_layers_have_many_names(module: str, layer: tuple[str, int] | None) -> None:
    assert layer_of(module) == layer
    assert is_layer(module) == (layer is not None and module == f"{layer[0]}.{layer[1]}")


@pytest.mark.parametrize("site", ["lm_head", "language_model.lm_head", "model.lm_head"])
def test_logits_are_found_under_any_prefix(site: str) -> None:
    records = [made(0, "model.norm"), made(1, site, operator="matmul"), made(2, "lm_head_norm")]
    assert logits_of(Recording(HEADER, records)) is records[1]
    assert logits_of(Recording(HEADER, records[:1])) is None


def test_an_encoder_and_a_decoder_have_rows_of_their_own() -> None:
    records = [
        made(0, "encoder.embed_tokens", amax=1.0),
        *(made(1 + n, f"encoder.block.{n}", amax=10.0 + n) for n in range(2)),
        *(made(3 + n, f"decoder.block.{n}", amax=20.0 + n) for n in range(2)),
        made(5, "lm_head", amax=3.0),
    ]
    rows = by_layer(Recording(HEADER, records))
    assert [(row.name, row.layer, row.amax) for row in rows] == [
        ("embed", None, 1.0),
        ("encoder 0", 0, 10.0),
        ("encoder 1", 1, 11.0),
        ("decoder 0", 0, 20.0),
        ("decoder 1", 1, 21.0),
        ("logits", None, 3.0),
    ]


def test_losses_are_followed_through_layers_of_any_name() -> None:
    first = made(0, "encoder.block.0", positive_inf=1, broke=broke(causal=False))
    after = [made(n, f"decoder.block.{n}", nan=12, lost_positions=3, lost_channels=4) for n in (1, 2)]
    assert [link.site for link in chain(Recording(HEADER, [first, *after])) if link.event == "layer"] == [
        "decoder.block.1",
        "decoder.block.2",
    ]
