"""What to do about an overflow, by the part of the model: what is certain, and what is called a candidate."""

import math
from dataclasses import replace
from typing import Any

import pytest
from recordings import HEADER as FINITE
from recordings import broke, made

from stabilitykit.diagnosis import cause, verdict
from stabilitykit.records import Record, Recording

HEADER = replace(FINITE, lost_steps=(0,))

WIDER = "Use a format with a wider range (bfloat16, float32)."


def overflow(site: str, operator: str = "matmul", *, order: int = 2, layer: int | None = None, **seen: Any) -> Record:
    changes = {"label": seen.pop("label", None), "dtype": seen.pop("dtype", "float16")}
    usual = {"operands": (300.0, 310.0), "operand_sites": ("norm", "weight"), "value": 93_000.0, "causal": False}
    told: dict[str, Any] = usual | seen
    record = made(order, site, operator=operator, positive_inf=1, lost_positions=1, broke=broke(**told), **changes)
    return record if layer is None else replace(record, layer=layer)


def remedy(*records: Record, **header: Any) -> str:
    found = cause(Recording(replace(HEADER, **header), list(records)))
    assert found is not None
    assert found.remedy in verdict(Recording(replace(HEADER, **header), list(records)))
    return found.remedy


def lost(order: int, site: str, operator: str, **changes: Any) -> Record:
    return made(order, site, operator=operator, positive_inf=1, **changes)


# Overflows, by the part of the model


@pytest.mark.parametrize("label", ["residual after attention", "residual after MLP", "embedding, scaled", "embedding"])
def test_the_residual_stream_of_a_known_decoder_can_be_scaled(label: str) -> None:
    known = "Use a format with a wider range (bfloat16, float32), or scale the residual stream down by a power of two."
    assert remedy(overflow("layers.7", "add", label=label)) == known


def test_so_can_what_is_added_to_it_without_a_norm_between() -> None:
    written = overflow("layers.0.mlp.down_proj", label="down projection")
    added = remedy(written, lost(3, "layers.0", "add"))
    assert added.endswith("or scale the residual stream down by a power of two.")
    normed = remedy(written, lost(3, "layers.0.post_feedforward_layernorm/pow.0", "pow"))
    assert "residual" not in normed


def candidate(*records: Record, **header: Any) -> str:
    """What is called one; everything before it is advice to use a wider format."""
    lead, _, told = remedy(*records, **header).partition(" A candidate, not tried: ")
    assert lead == WIDER
    return told


MLP = "layers.1.mlp"


def test_gate_times_up_is_scaled_between_up_and_down() -> None:
    product = overflow(
        f"{MLP}/mul.0",
        "mul",
        operand_sites=(f"{MLP}.act_fn", f"{MLP}.up_proj"),
        operands=(256.0, 264.0),
        value=67_584.0,
    )
    said = candidate(product, lost(3, f"{MLP}.down_proj", "matmul"))
    assert said == "multiply up_proj by 2^-k and down_proj by 2^k, k of at least 1, which leaves their result as it is."


def test_the_names_are_the_models_own() -> None:
    path = "encoder.block.1.layer.1.DenseReluDense"
    product = overflow(f"{path}/mul.0", "mul", operand_sites=(f"{path}/gelu.0", f"{path}.wi_1"), value=300_000.0)
    said = candidate(product, lost(3, f"{path}.wo", "matmul"))
    assert said.startswith("multiply wi_1 by 2^-k and wo by 2^k, k of at least 3, which")
    up = overflow(f"{MLP}.up_proj", label="up projection", value=-70_000.0)
    assert candidate(up, lost(3, f"{MLP}/mul.0", "mul"), lost(4, f"{MLP}.down_proj", "matmul")).startswith(
        "multiply up_proj by 2^-k and down_proj by 2^k, k of at least 1"
    )


ATTENTION = "layers.0.self_attn"


def test_scores_before_their_scale() -> None:
    records = [
        overflow(f"{ATTENTION}/matmul.0", value=76_611.0, scaled=8_566.0),
        lost(3, f"{ATTENTION}/mul.0", "mul"),
        made(4, f"{ATTENTION}/softmax.0", operator="softmax", nan=3),
    ]
    assert candidate(*records) == (
        'fold the scale into q_proj, so that the product is scaled already, or use attn_implementation="sdpa".'
    )
    assert " Times its scale it would be 8,566, which float16 holds. " in verdict(Recording(HEADER, records))
    unknown = [overflow(f"{ATTENTION}/matmul.0", value=76_611.0), *records[1:]]
    assert "Times its scale" not in verdict(Recording(HEADER, unknown))
    large = [overflow(f"{ATTENTION}/matmul.0", value=76_611.0, scaled=80_000.0), *records[1:]]
    assert "Times its scale" not in verdict(Recording(HEADER, large))


@pytest.mark.parametrize(
    ("site", "label", "said"),
    [
        ("q_proj", None, "multiply q_proj by 2^-k and the attention's scale by 2^k, k of at least 1, which"),
        (
            "key",
            None,
            "multiply key by 2^-k and the attention's scale by 2^k, k of at least 1, which leaves the scores",
        ),
        (
            "v_proj",
            None,
            "multiply v_proj by 2^-k and the output projection by 2^k, k of at least 1, which leaves their",
        ),
        ("x", "query projection", "multiply x by 2^-k and the attention's scale by 2^k, k of at least 1"),
    ],
)
def test_projections_of_attention(site: str, label: str | None, said: str) -> None:
    assert candidate(overflow(f"{ATTENTION}.{site}", label=label)).startswith(said)


def test_an_expert_before_its_routing_weight() -> None:
    experts = "layers.1.mlp.experts"
    records = [
        overflow(f"{experts}/matmul.5", value=99_870.0, scaled=19_974.0),
        lost(3, f"{experts}/mul.5", "mul"),
    ]
    assert candidate(*records) == "multiply by the routing weight before down_proj instead of after it."
    assert " Times its routing weight it would be 19,974, which float16 holds. " in verdict(Recording(HEADER, records))


def test_a_projection_that_a_norm_reads() -> None:
    records = [
        overflow("vision_embedder.patch_dense", value=75_600.0),
        made(3, "vision_embedder.patch_ln2", operator="native_layer_norm", nan=4),
    ]
    assert candidate(*records) == (
        "multiply patch_dense by 2^-k and the eps of patch_ln2 by 2^-2k, k of at least 1, which leaves what the norm "
        "returns as it is."
    )
    unread = [records[0], made(3, "vision_embedder.patch_ln2", operator="native_layer_norm")]
    assert remedy(*unread) == WIDER  # the norm reads something else


@pytest.mark.parametrize(
    ("site", "operator", "sites"),
    [
        ("encoder.layers.1.self_attn_layer_norm/mul.0", "mul", ("a", "b")),
        ("layers.0.input_layernorm/pow.0", "pow", ("layers.0",)),
        ("/pow.0", "pow", ("x",)),
        ("/mul.0", "mul", ("/sub.0", "/sub.0")),
    ],
)
def test_a_norm_that_is_spelled_out(site: str, operator: str, sites: tuple[str, ...]) -> None:
    mean = lost(3, f"{site.partition('/')[0]}/mean.0", "mean")
    said = candidate(overflow(site, operator, operand_sites=sites), mean)
    assert said == "compute this norm in float32, squares and their mean included."


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [
        (
            "float16",
            1.18e9,
            f"{WIDER} A candidate, not tried: subtract the largest exponent first, as softmax does, or",
        ),
        (
            "float32",
            7.2e86,
            "Neither bfloat16 nor float32 holds this value, only float64 does. A candidate, not tried:",
        ),
        (
            "bfloat16",
            7.2e86,
            "Neither bfloat16 nor float32 holds this value, only float64 does. A candidate, not tried:",
        ),
        ("float16", math.inf, "Neither bfloat16 nor float32 holds this value. A candidate, not tried: subtract the"),
    ],
)
def test_an_exponential(dtype: str, value: float, said: str) -> None:
    limit = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38}[dtype]
    found = overflow("/exp.0", "exp", operands=(99.0,), value=value, dtype=dtype, limit=limit)
    told = remedy(found, dtype=dtype)
    assert told.startswith(said)
    most = {"float16": "11.08", "bfloat16": "88.71", "float32": "88.72"}[dtype]
    assert told.endswith(f"or clamp the exponent; exp fits up to {most}.")


def test_a_position_that_the_dtype_does_not_hold() -> None:
    cast = overflow("rotary_emb/constant_cast.0", "cast", operands=(70_000.0,), value=70_000.0)
    assert remedy(cast) == (
        "Compute positions and rotary angles in float32: float16 holds no number past 65,504, and not every whole "
        "number past 2,048."
    )


def test_a_key_that_is_written_into_a_cache() -> None:
    cast = overflow(f"{ATTENTION}/cast.0", "cast", operands=(-200_000.0,), value=-200_000.0)
    assert candidate(cast) == (
        "keep keys and values in a format that holds them, or leave out what stands for no key and mask it."
    )
    low = overflow(f"{ATTENTION}/cast.0", "cast", value=800.0, dtype="float8_e4m3fn", limit=448.0)
    assert remedy(low).startswith("Use a format with a wider range (float16, bfloat16, float32). A candidate")


def test_a_mask_that_overflows_with_the_score_is_never_told_to_use_the_minimum() -> None:
    added = overflow(f"{ATTENTION}/add.2", "add", operands=(-65_504.0, -50.0), value=-65_554.0)
    assert remedy(added) == (
        "Give masked positions half of the dtype's minimum, or pass a boolean mask: a score added to the minimum "
        "itself overflows."
    )


def test_logits_sums_and_casts() -> None:
    assert candidate(overflow("model.lm_head")) == "compute the logits in float32, the product of the head alone."
    assert candidate(overflow("up.cast", "cast")).startswith("leave this tensor in the wider dtype")
    summed = "scale down by one power of two everything that is added up from layer to layer, if only norms read it."
    assert candidate(overflow("h.3/add.0", "add")) == f"keep this sum in float32, or {summed}"
    wo = overflow("encoder.block.1.layer.1.DenseReluDense.wo")
    added = lost(3, "encoder.block.1.layer.1/add.0", "add")
    assert candidate(wo, added) == f"keep wo and the sum that it is added to in float32, or {summed}"


def test_where_nothing_is_known_nothing_but_the_format_is_advised() -> None:
    assert remedy(overflow("wo1")) == WIDER
    assert remedy(overflow("wo1", value=None)) == ""
    assert "residual" not in remedy(overflow("layers.0", "add"))  # of a model that is not known


def test_a_partial_sum() -> None:
    summed = overflow("/sum.0", "sum", kind="reduction", value=12.0)
    assert candidate(summed) == ("let this operator sum in float32; only a partial sum overflows, and the result fits.")


@pytest.mark.parametrize(
    ("dtype", "value", "names"),
    [
        ("float16", 70_000.0, "bfloat16, float32"),
        ("float8_e4m3fn", 500.0, "float16, bfloat16, float32"),
        ("float8_e4m3fn", 70_000.0, "bfloat16, float32"),
    ],
)
def test_only_formats_that_hold_the_value_are_advised(dtype: str, value: float, names: str) -> None:
    assert remedy(overflow("wo1", value=value, dtype=dtype)) == f"Use a format with a wider range ({names})."


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_never_the_runs_own_dtype(dtype: str) -> None:
    found = overflow("wo1", value=1e39, dtype=dtype, limit=3.39e38)
    assert remedy(found, dtype=dtype) == "Neither bfloat16 nor float32 holds this value, only float64 does."
    stream = overflow("layers.7", "add", label="residual after MLP", value=1e39, dtype=dtype)
    assert remedy(stream, dtype=dtype).endswith("only float64 does. Scale the residual stream down by a power of two.")
