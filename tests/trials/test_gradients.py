"""A run with a backward pass is judged by the gradients that it leaves, too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitykit.records.trials import Diagnosis
from stabilitykit.trials.diagnose import diagnose_run


class Curve(nn.Module):
    """A layer and a function of its output; the loss is the sum, times `scale`."""

    def __init__(self, code: Callable[[Tensor], Tensor], scale: float) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.code, self.scale = code, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self.first(x))


def run(x: float) -> Callable[[Any], Tensor]:
    def step(model: Any) -> Tensor:
        y = model(torch.full((1, 2, 4), x).to(next(model.parameters()).dtype))
        (y.float().sum() * model.scale).backward()
        return y.float()  # another tensor in float16, and the same in float32

    return step


def diagnosed(code: Callable[[Tensor], Tensor], x: float, scale: float = 1.0) -> tuple[Diagnosis, nn.Module]:
    torch.manual_seed(0)
    model = Curve(code, scale)
    model.first.weight.data.abs_()
    model.half()
    return diagnose_run(model, run(x), grad=True), model


def gradient(model: nn.Module, x: float, dtype: torch.dtype) -> Tensor:
    model.to(dtype)
    model.zero_grad()
    run(x)(model)
    held = next(model.parameters()).grad
    assert held is not None
    return held.double()


def test_a_gradient_that_no_format_holds_is_cured_by_none() -> None:
    found, _ = diagnosed(torch.sqrt, 0.0)
    assert not found.finite
    assert {trial.name: trial.cured for trial in found.trials} == {"bfloat16": False, "float32": False}
    assert "It is not the format" in found.advice
    assert "In no format is the derivative of sqrt finite" in found.verdict


def test_a_gradient_that_float16_does_not_hold_is_held_by_wider_formats() -> None:
    found, model = diagnosed(lambda h: h * 300, 1.0, 300.0)
    assert not found.finite
    assert not bool(gradient(model, 1.0, torch.float16).isfinite().all())
    assert {trial.name: trial.cured for trial in found.trials} == {"bfloat16": True, "float32": True}
    assert "sk.diagnose_training(make)" in found.advice
    assert "untried" not in found.verdict
    wide, low = gradient(model, 1.0, torch.float32), gradient(model, 1.0, torch.bfloat16)
    assert found["bfloat16"].distance is not None
    error = float((low - wide).abs().max() / wide.abs().max())
    assert found["bfloat16"].distance.error_max == pytest.approx(error, abs=0.01)  # outputs are rows, too


def test_gradients_that_underflow_are_told_from_float32s() -> None:
    """What is returned is the same in both: only gradients are all 0."""
    found, model = diagnosed(lambda h: h * 1, 1.0, 1e-9)
    assert found.finite
    assert not gradient(model, 1.0, torch.float16).any()
    assert found.plain is not None
    assert found.plain.error_max == 1.0
    assert found["float32"].cured
    assert "finite, and wrong" in found.advice


def test_gradients_of_the_callers_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    model = Curve(lambda h: h * 300, 300.0).half()
    model.first.weight.grad = torch.full((4, 4), 3.0).half()
    diagnose_run(model, run(1.0), grad=True)
    assert torch.equal(model.first.weight.grad, torch.full((4, 4), 3.0).half())
