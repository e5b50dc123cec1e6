"""Weights are counted as a cast would treat them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


def counts(found: StoredWeights) -> tuple[int, int, int, int]:
    return found.overflow, found.subnormal, found.zero, found.nonfinite


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_any_float32_is_counted_as_a_cast_treats_it(bits: list[int]) -> None:
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    found = check_weights([("w", values)], list(DTYPES))
    assert {name: counts(found[name]) for name in DTYPES} == {name: by_casting(values, name) for name in DTYPES}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_weight_is_counted_as_a_cast_treats_it(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    found = check_weights([("w", values.T)], list(DTYPES))  # strides do not matter
    assert {name: counts(found[name]) for name in DTYPES} == {name: by_casting(values, name) for name in DTYPES}
    assert found["float16"].elements == 2**16


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
