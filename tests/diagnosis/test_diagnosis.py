"""What is said of a run, on records made by hand, so that every sentence can be compared whole."""

from dataclasses import replace
from typing import Any

import pytest
from recordings import HEADER, broke, lost_everything, made

from stabilitykit.diagnosis import by_layer, cause, chain, document, is_finite, verdict
from stabilitykit.records import BreakKind, FormatCounts, Recording, Softmax, StoredWeights, WeightCounts

BROKEN = [
    made(0, "embed_tokens", label="embedding, scaled"),
    made(1, "layers.0/add.0", amax=60000.0, label="residual after attention"),
    made(
        2,
        "layers.0",
        label="residual after MLP",
        positive_inf=1,
        lost_positions=1,
        lost_channels=1,
        broke=broke(),
    ),
    made(3, "layers.1.input_layernorm/mul.0", operator="mul", dtype="float32", nan=1, label="normalised in a norm"),
    lost_everything(4, "layers.1", label="residual after MLP"),
    lost_everything(5, "lm_head", operator="matmul", label="logits"),
    lost_everything(6, "sampler/softmax.0", operator="softmax", dtype="float32"),
]


def test_a_break_is_told_from_its_operands_to_its_error() -> None:
    header = replace(HEADER, error="not a probability", case={"greedy_text": "<pad>"})
    recording = Recording(header, BROKEN)
    reference = Recording(replace(HEADER, dtype="float32", watched=(("layers.0", 2, 68123.0),)), [])
    assert verdict(recording, reference) == (
        "float16 overflows in layer 0, residual after MLP (layers.0, operator add), at token 0 '<bos>', channel 2: "
        "60,000 + 8,000 = 68,000 exceeds the float16 maximum, 65,504. The float32 run has 68,123 there. This depends "
        "only on the first token, <bos>: every prompt that starts with it overflows here. In layer 1, normalised in a "
        "norm (layers.1.input_layernorm/mul.0, operator mul) infinity becomes NaN (inf · 0), after layer 1 every "
        "token is lost, every logit is NaN and sampling raises: not a probability. Greedy decoding raises nothing "
        "and prints <pad>, the argmax of NaN. Use a format with a wider range (bfloat16, float32), or scale the "
        "residual stream down by a power of two."
    )
    assert [(link.event, link.site) for link in chain(recording)] == [
        ("break", "layers.0"),
        ("first NaN", "layers.1.input_layernorm/mul.0"),
        ("layer", "layers.1"),
        ("logits", "lm_head"),
        ("probabilities", "sampler/softmax.0"),
        ("error", "sampler"),
        ("greedy", "sampler"),
    ]
    found = document(recording, reference)
    assert found["first_break"]["reference_value"] == 68123.0
    assert (found["finite"], found["cause"], found["tokens"]) == (False, "range", [2, 7, 9])


def test_what_the_reference_run_has_is_that_of_the_same_step() -> None:
    recording = Recording(HEADER, [replace(BROKEN[2], step=1)])
    watched = (("layers.0", 2, 3.0), ("layers.0", 2, 68123.0))
    both = [made(0, "layers.0"), replace(made(1, "layers.0"), step=1)]
    reference = Recording(replace(HEADER, dtype="float32", watched=watched), both)
    assert document(recording, reference)["first_break"]["reference_value"] == 68123.0
    only_the_first = Recording(replace(HEADER, dtype="float32", watched=watched[:1]), both[:1])
    assert document(recording, only_the_first)["first_break"]["reference_value"] is None


def test_a_harm_that_was_measured_is_told_instead_of_what_records_suggest() -> None:
    broken = made(0, "layers.0/mul.0", positive_inf=1, lost_positions=1, lost_channels=1, broke=broke())
    recording = Recording(
        HEADER, [broken, made(1, "layers.0/div.0", operator="div", absorbs=True), made(2, "layers.0")]
    )
    assert "is finite, and wrong" in verdict(recording)
    assert "wrong" not in verdict(recording, harmful=False)
    assert "wrong" in verdict(recording, harmful=True)


def test_a_healthy_run_says_how_much_headroom_is_left() -> None:
    recording = Recording(HEADER, [made(0, "layers.0", amax=16376.0, label="residual after MLP")])
    assert verdict(recording) == (
        "float16 is finite throughout. The largest magnitude is 16,376, in layer 0, residual after MLP (layers.0, "
        "operator add), at token 1 ' a': 2.0 bits of headroom below the maximum (65,504)."
    )
    assert chain(recording) == ()
    assert cause(recording) is None
    assert is_finite(recording)


def test_an_empty_recording_says_so() -> None:
    assert verdict(Recording(HEADER, [])) == "float16: nothing was recorded."
    assert by_layer(Recording(HEADER, [])) == []


def test_redacted_findings_name_positions_only() -> None:
    unnamed = replace(BROKEN[2], broke=broke(token=None))
    recording = Recording(replace(HEADER, tokens=None, token_texts={}), [*BROKEN[:2], unnamed, *BROKEN[3:]])
    assert "at token 0, channel 2:" in verdict(recording)
    assert "bos" not in str(document(recording))


def test_a_later_position_depends_on_the_tokens_up_to_it() -> None:
    later = replace(BROKEN[2], broke=broke(position=2))
    told = "This depends only on the first 3 tokens: every prompt that starts with them overflows here."
    assert told in verdict(Recording(HEADER, [*BROKEN[:2], later]))


@pytest.mark.parametrize(
    ("site", "kind", "case", "name"),
    [
        ("layers.0", "overflow", {}, "range"),
        ("layers.0", "reduction", {}, "range"),
        ("layers.0", "unresolved", {}, "unresolved"),
        ("layers.0", "invalid", {}, "invalid-operation"),
        ("layers.0.self_attn/softmax.0", "masked-row", {}, "masked-row"),
        ("layers.0", "weight", {}, "weights"),
        ("layers.0", "input", {}, "input"),
        ("sampler/div.0", "overflow", {"temperature": 1e-4}, "temperature"),
        ("sampler/div.1", "invalid", {"top_k": 0}, "top-k"),
        ("sampler/div.1", "invalid", {"top_k": 5, "top_p": -1.0}, "top-p"),
        ("layers.0", "overflow", {"loading": {"unexpected": ["a.weight_scaler"]}}, "int8-scalers-dropped"),
        ("layers.0", "weight", {"loading": {"missing": ["a.weight"], "unexpected": ["b"]}}, "parameter-names"),
    ],
)
def test_causes_are_told_apart(site: str, kind: BreakKind, case: dict[str, Any], name: str) -> None:
    record = made(0, site, positive_inf=1, broke=broke(kind))
    recording = Recording(replace(HEADER, case=case), [record])
    found = cause(recording)
    assert found is not None
    assert found.name == name
    assert found.remedy in verdict(recording)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a"], "The checkpoint lacks 1 parameter of the model by name (a; it has b instead), and"),
        (["a", "c"], "The checkpoint lacks 2 parameters of the model by name (a and c; it has b instead), and"),
    ],
)
def test_one_parameter_is_counted_as_one(names: list[str], told: str) -> None:
    case = {"loading": {"missing": names, "unexpected": ["b"]}}
    record = made(0, "layers.0", positive_inf=1, broke=broke("weight"))
    assert told in verdict(Recording(replace(HEADER, case=case), [record]))


def stored_weights(nonfinite: int, overflow: int) -> StoredWeights:
    worst = WeightCounts(
        name="layers.0.mlp.up_proj.weight", elements=8, overflow=overflow, subnormal=0, zero=0, nonfinite=nonfinite
    )
    return StoredWeights(
        dtype="float16", elements=80, overflow=overflow, subnormal=0, zero=0, nonfinite=nonfinite, worst=(worst,)
    )


@pytest.mark.parametrize(("nonfinite", "name"), [(2, "weights"), (0, "unresolved")])
def test_what_no_operator_explains_is_the_weights_where_they_were_not_finite(nonfinite: int, name: str) -> None:
    record = made(0, "layers.0", positive_inf=1, broke=broke("unresolved"))
    recording = Recording(replace(HEADER, level="layers", weights=stored_weights(nonfinite, overflow=0)), [record])
    found = cause(recording)
    assert found is not None
    assert found.name == name
    told = "2 of them are NaN or infinite in the checkpoint itself (layers.0.mlp.up_proj.weight)"
    assert (told in verdict(recording)) == (nonfinite > 0)


def test_a_piece_is_shown_as_it_is_once() -> None:
    header = replace(HEADER, token_texts={2: "\\n", 7: "it's", 9: "."})
    line = Recording(header, BROKEN)
    assert "at token 0 '\\n', channel 2:" in verdict(line)
    raw = verdict(Recording(replace(header, token_texts={2: "\n"}), BROKEN))  # of a tokenizer that is not the kit's
    assert raw == verdict(line)
    assert chain(line)[0].text.endswith("at position 0 '\\n', channel 2")
    quote = Recording(header, [made(0, "layers.0")])
    assert 'at token 1 "it\'s"' in verdict(quote)


def test_a_token_without_a_text_is_its_id_and_never_a_text() -> None:
    header = replace(HEADER, token_texts={})
    broken = Recording(header, BROKEN)
    assert "at token 0 (id 2), channel 2: 60,000 + 8,000" in verdict(broken)
    assert "This depends only on the first token (id 2): every prompt" in verdict(broken)
    assert chain(broken)[0].text == "overflow: 1 element lost at position 0 (id 2), channel 2"
    found = document(broken)["first_break"]
    assert (found["token"], found["token_id"]) == (None, 2)
    assert "at token 1 (id 7): 2.0 bits of headroom" in verdict(Recording(header, [made(0, "layers.0", amax=16376.0)]))


def test_layers_are_judged_by_what_is_stored_in_the_dtype() -> None:
    softmax = Softmax(
        max_logit=1.0, logit_range=1.0, entropy_min=(0.1, 0.3), entropy_mean=(1.0, 2.0), max_probability=1.0,
        sum_error=0.0, underflow_share=0.0, masked_rows=0, nan_rows=0,
    )  # fmt: skip
    records = [
        made(0, "embed_tokens", amax=1.0),
        made(1, "layers.0.input_layernorm/pow.0", dtype="float32", amax=1e10),
        made(2, "layers.0.self_attn/softmax.0", dtype="float32", amax=1.0, softmax=softmax),
        made(3, "layers.0", amax=32752.0, subnormal=3, formats={"float16": FormatCounts(5, 0, 0)}),
        made(4, "norm", amax=None, nan=12),
        made(5, "elsewhere"),
    ]
    rows = by_layer(Recording(HEADER, records))
    assert [(row.name, row.amax, row.lost) for row in rows] == [
        ("embed", 1.0, 0),
        ("0", 32752.0, 0),
        ("norm", None, 12),
    ]
    layer = rows[1]
    assert (layer.headroom, layer.subnormal, layer.past) == (1.0, 3, 5)
    assert (layer.entropy_min, layer.entropy_mean) == (0.1, 1.5)
    # In a float32 run the squares in a norm have the run's dtype too: what a float16 run stores, a dry run found out.
    wide = replace(HEADER, dtype="float32")
    told = [replace(record, dtype="float32", stored_dtype=record.dtype) for record in records]
    untold = [replace(record, dtype="float32") for record in records]
    assert [by_layer(Recording(wide, made))[1].amax for made in (told, untold)] == [32752.0, 1e10]


def test_of_several_generations_steps_the_last_logits_count() -> None:
    second = [replace(lost_everything(9, "lm_head"), step=1)]
    assert not is_finite(Recording(HEADER, [made(0, "lm_head"), *second]))
    assert is_finite(Recording(HEADER, [*second, made(10, "lm_head", step=2)]))
