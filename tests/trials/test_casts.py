"""A model that stays in float32, and a run that casts to a narrower format: autocasting, or code of its own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from truth.decoders import AT, IDS
from truth.models import decoder
from truth.plants import answer

import stabilitykit as sk
from stabilitykit.records.trials import Diagnosis
from stabilitykit.trials.diagnose import diagnose_run
from stabilitykit.trials.recast import Precision, Recast


def forward(model: Any) -> Tensor:
    logits: Tensor = model(IDS).logits
    return logits


def overflowing() -> Any:
    """Of its down projection one number is 80,000, which only a residual stream in float16 or its cast loses."""
    model = decoder("llama")
    answer(model, "model.layers.1.mlp.down_proj", forward, {AT: 80000.0})
    return model


def autocast(dtype: torch.dtype) -> Any:
    def run(model: Any) -> Tensor:
        with torch.autocast("cpu", dtype):
            return forward(model)

    return run


def names(found: Diagnosis) -> set[str]:
    return {one.name for one in found.cures}


def test_autocasting_is_diagnosed_in_the_dtype_that_it_casts_to() -> None:
    model = overflowing()
    assert not autocast(torch.float16)(model).isfinite().all()
    assert autocast(torch.bfloat16)(model).isfinite().all()
    found = diagnose_run(model, autocast(torch.float16))
    assert found.dtype == "float16"
    assert not found.finite
    assert {"rescale", "float32 operator", "bfloat16", "float32"} <= names(found)
    assert any("torch.autocast" in note for note in found.notes)
    assert found["bfloat16"].command.startswith("torch.bfloat16 where the run casts to torch.float16")
    assert found["bfloat16"].memory == 0  # no weight changes


def test_bfloat16_in_its_place_gives_what_autocasting_to_bfloat16_gives() -> None:
    model = overflowing()
    with torch.inference_mode():
        expected = autocast(torch.bfloat16)(model)
        with Recast(torch.bfloat16, torch.float16):
            made = autocast(torch.float16)(copy.deepcopy(model))
    assert torch.equal(made, expected)


def test_autocasting_around_the_call_is_seen_and_left_as_it_was() -> None:
    model = overflowing()
    before = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", torch.float16):
        found = sk.diagnose(model, IDS)
        assert torch.get_autocast_dtype("cpu") == torch.float16
    assert torch.get_autocast_dtype("cpu") == before
    assert found.dtype == "float16"
    assert not found.finite
    assert {"bfloat16", "float32"} <= names(found)


class Casts(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).to(self.dtype).to(x.dtype) * 0.5


@pytest.mark.parametrize(
    ("dtype", "finite"), [("float16", {"bfloat16", "float32"}), ("float8_e5m2", {"float32"})]
)  # what is bfloat16 would be cast to float8 all the same
def test_code_that_casts_is_diagnosed_in_that_dtype(dtype: str, finite: set[str]) -> None:
    found = sk.diagnose(Casts(getattr(torch, dtype)), torch.full((1, 2, 4), 1e5))
    assert found.dtype == dtype
    assert {one.name for one in found.trials if one.is_format and one.cured} == finite


def test_a_float32_model_that_casts_nothing_is_tried_in_float16() -> None:
    model = overflowing()
    assert diagnose_run(model, forward).dtype == "float16"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_rounds_as_the_format_does_and_keeps_range(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64), torch.randn(64)
    with Precision(dtype):
        ours = x * y
        large = x * 2.0**100
    assert torch.equal(ours, (x * y).to(dtype).float())
    assert large.isfinite().all()
    with Precision(dtype, torch.floor):
        down = x * y
    assert (down <= x * y).all()
    assert not torch.equal(down, ours)
    with Precision(dtype):
        special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0]) * 1.0
    assert special.isinf().tolist() == [True, True, False, False]
    assert special.isnan().tolist() == [False, False, True, False]
