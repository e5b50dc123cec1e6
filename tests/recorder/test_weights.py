"""Weights are counted as a cast would treat them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabilitykit import open_model, profile
from stabilitykit.formats import number_format
from stabilitykit.recorder.weights import check_weights
from stabilitykit.records import StoredWeights

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def by_casting(values: torch.Tensor, name: str) -> tuple[int, int, int, int]:
    """overflow, subnormal, zero, nonfinite: from torch's own cast."""
    finite = values[values.isfinite()]
    cast = finite.to(DTYPES[name]).double()
    normal = number_format(name).smallest_normal
    return (
        int(cast.isinf().sum()),
        int(((cast != 0) & (cast.abs() < normal)).sum()),
        int(((cast == 0) & (finite != 0)).sum()),
        int((~values.isfinite()).sum()),
    )


def named_by_casting(values: torch.Tensor, name: str) -> tuple[tuple[int, ...] | None, float | None]:
    """Index and value of the first element that is lost or, without one, that vanishes: from torch's own cast."""
    cast = values.to(DTYPES[name])
    for wanted in (~cast.isfinite(), (cast == 0) & (values != 0)):
        if wanted.any():
            index = tuple(wanted.nonzero()[0].tolist())
            return index, float(values[index])
    return None, None


def named(found: StoredWeights) -> tuple[tuple[int, ...] | None, float | None]:
    return (found.worst[0].index, found.worst[0].value) if found.worst else (None, None)


def counts(found: StoredWeights) -> tuple[int, int, int, int]:
    return found.overflow, found.subnormal, found.zero, found.nonfinite


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_any_float32_is_counted_as_a_cast_treats_it(bits: list[int]) -> None:
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    found = check_weights([("w", values)], list(DTYPES))
    assert {name: counts(found[name]) for name in DTYPES} == {name: by_casting(values, name) for name in DTYPES}
    for name in DTYPES:
        assert str(named(found[name])) == str(named_by_casting(values, name))  # NaN is NaN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_weight_is_counted_as_a_cast_treats_it(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    found = check_weights([("w", values.T)], list(DTYPES))  # strides do not matter
    assert {name: counts(found[name]) for name in DTYPES} == {name: by_casting(values, name) for name in DTYPES}
    assert found["float16"].elements == 2**16
    for name in DTYPES:
        assert str(named(found[name])) == str(named_by_casting(values.T, name))


def test_an_element_is_named_by_its_index_in_the_whole_tensor() -> None:
    large = torch.ones(6, 1 << 20)  # more than is read at a time
    large[4, 77], large[5, 3], large[2, 9] = -70_144.0, math.nan, 1e-9
    scalar, empty = torch.tensor(math.inf), torch.ones(0, 3)
    found = check_weights([("large", large), ("scalar", scalar), ("empty", empty)], ["float16", "bfloat16"])
    (first, second) = found["float16"].worst
    assert (first.name, first.index, first.value) == ("large", (4, 77), -70_144.0)
    assert (second.name, second.index, second.value) == ("scalar", (), math.inf)
    wide = found["bfloat16"].worst[0]
    assert (wide.name, wide.index, str(wide.value)) == ("large", (5, 3), "nan")


def test_each_kind_has_the_tensor_with_most_of_it() -> None:
    tensors = {
        "norm": torch.tensor([1.0, 1.0, 1.0, 70_144.0]),
        **{f"large.{i}": torch.full((3 + i,), 1e6) for i in range(6)},
        "gate": torch.cat([torch.full((64,), 1e-9), torch.full((3,), 1e-6)]),
        "up": torch.cat([torch.full((3,), 1e-9), torch.full((90,), 1e-6)]),
        "subnormal": torch.full((99,), 1e-6),
    }
    found = check_weights(tensors.items(), ["float16"])["float16"]
    shown = [worst.name for worst in found.worst]
    assert shown == ["large.5", "large.4", "large.3", "large.2", "large.1", "subnormal", "gate"]
    for kind, name in {"overflow": "large.5", "zero": "gate", "subnormal": "subnormal"}.items():
        most = found.most(kind)  # type: ignore[arg-type]
        assert most is not None
        assert most.name == name
    assert found.most("nonfinite") is None
    zero = found.most("zero")
    assert zero is not None
    assert zero.index == (0,)
    assert zero.value == pytest.approx(1e-9)
    assert found.worst[-2].index is None  # subnormal is no loss of any one element


def test_blocks_of_a_quantised_tensor_are_counted_through_its_rows() -> None:
    weight = torch.ones(3, 1024)
    weight[1, 256:512] = math.inf
    for blocks, block in (({"w": 256}, 5), ({"other": 256}, None)):
        (worst,) = check_weights([("w", weight)], ["float16"], blocks=blocks)["float16"].worst
        assert (worst.index, worst.block, worst.nonfinite) == ((1, 256), block, 256)
        assert worst.block_size == (256 if block else None)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.0.self_attn.q_proj.scales", "scale"),  # GPTQ, AWQ
        ("model.layers.0.self_attn.q_proj.qzeros", "zero point"),
        ("model.layers.0.mlp.gate_proj.weight_scaler", "scale"),  # gemma_pytorch's int8
        ("model.layers.0.mlp.gate_proj.weight_scale", "scale"),  # float8
        ("model.layers.0.mlp.gate_proj.weight_scale_inv", "scale"),
        ("model.layers.0.mlp.gate_proj.input_scale", "scale"),
        ("model.layers.0.mlp.experts.down_proj_scale_inv", "scale"),
        ("model.layers.0.mlp.experts.gate_up_proj_scales", "scale"),
        ("model.layers.0.mlp.gate_proj.weight.absmax", "scale"),  # bitsandbytes
        ("model.layers.0.mlp.gate_proj.SCB", "scale"),
        ("model.layers.0.mlp.gate_proj.weight_zero_point", "zero point"),
        ("logit_scale", None),
        ("layers.0.layer_scale", None),
        ("layers.0.mlp.gate_proj.weight", None),
        ("grayscale.weight", None),
        ("router.scale", None),
    ],
)
def test_scales_of_quantised_layers_are_told_from_weights(name: str, role: str | None) -> None:
    scales = torch.tensor([[1.0, 1e6], [math.nan, 1.0]], dtype=torch.float32)
    packed = torch.zeros(4, 4, dtype=torch.int32)
    (worst,) = check_weights([("qweight", packed), (name, scales)], ["float16"])["float16"].worst
    assert (worst.name, worst.role, worst.index, worst.value) == (name, role, (0, 1), 1e6)


def test_scales_in_the_buffers_of_an_open_model_are_checked() -> None:
    subject = open_model("random:gemma3-270m?layers=1&hidden_size=32&feed_forward=64&heads=2&head_dim=16")
    layer = subject.module.get_submodule("layers.0.mlp")
    layer.register_buffer("scales", torch.tensor([1.0, math.inf]))
    layer.register_buffer("positions", torch.tensor([math.inf]))
    weights = profile(subject, "Hi", level="layers")["float32"].header.weights
    assert weights is not None
    assert [(worst.name, worst.role, worst.index) for worst in weights.worst if worst.nonfinite] == [
        ("layers.0.mlp.scales", "scale", (1,))
    ]


def test_ties_at_the_ends_of_float16() -> None:
    values = torch.tensor([65519.996, 65520.0, 2**-25, 2**-25 * (1 + 2**-20), 2**-14, 2**-14 - 2**-26, 0.0, -0.0])
    found = check_weights([("w", values)], ["float16"])["float16"]
    assert counts(found) == (1, 1, 1, 0)  # 2^-14 - 2^-26 is a tie that rounds up to the smallest normal


def test_the_worst_come_first_and_integers_are_passed_over() -> None:
    tensors = {
        "fine": torch.ones(10),
        "small": torch.full((10,), 1e-6),
        "large": torch.tensor([1e6]),
        "lost": torch.tensor([1.0, float("nan")]),
        "packed": torch.zeros(99, dtype=torch.int8),
    }
    read: list[int] = []
    found = check_weights(tensors.items(), ["float16"], read.append)["float16"]
    assert [worst.name for worst in found.worst] == ["lost", "large", "small"]
    assert (found.elements, found.nonfinite, found.overflow, found.subnormal) == (23, 1, 1, 10)
    assert sum(read) == sum(tensor.nbytes for tensor in tensors.values())


def test_the_270ms_weights_in_float16(checkpoint_270m: object) -> None:
    tensors = checkpoint_270m.tensors  # type: ignore[attr-defined]
    found = check_weights(tensors.items(), ["float16", "bfloat16"])
    assert counts(found["bfloat16"]) == (0, 0, 0, 0)
    assert found["float16"].subnormal == sum(by_casting(tensor, "float16")[1] for tensor in tensors.values()) > 0
    assert (found["float16"].overflow, found["float16"].nonfinite) == (0, 0)
