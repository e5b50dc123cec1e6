"""What is tried against a training step that fails is what cures it when it is done by hand."""

import io
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stabilitykit.errors import MisuseError
from stabilitykit.records.document import from_document, to_document
from stabilitykit.records.training import TrainingDiagnosis
from stabilitykit.report.parts.training import blocks
from stabilitykit.report.terminal import print_blocks
from stabilitykit.trials.step import Made
from stabilitykit.trials.training import diagnose_training
from stabilitykit.trials.widened import widened

IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "attn_implementation": "eager",
}  # fmt: skip


def llama(dtype: torch.dtype, optimizer: Any = torch.optim.SGD, **how: Any) -> Made:
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.to(dtype)
    made = optimizer(model.parameters(), lr=1e-3, **how)
    return model, {"input_ids": IDS, "labels": IDS}, lambda output: output.loss, made


def by_hand(dtype: torch.dtype, scale: float) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, kwargs, loss, _ = llama(dtype)
    (loss(model(**kwargs)) * scale).backward()
    return {name: held.grad.double() / scale for name, held in model.named_parameters() if held.grad is not None}


def finite(gradients: Mapping[str, Tensor]) -> bool:
    return all(bool(grad.isfinite().all()) for grad in gradients.values())


def error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, float]:
    parts = [
        ((ours[n].double() - wide.double()).abs() / wide.abs().max().double()).flatten() for n, wide in theirs.items()
    ]
    whole = torch.cat(parts)
    return float(whole.mean()), float(whole.max())


@pytest.fixture(scope="module")
def overflowing() -> TrainingDiagnosis:
    return diagnose_training(llama, loss_scale=2.0**19)


def test_a_loss_scale_that_is_too_large(overflowing: TrainingDiagnosis) -> None:
    found = overflowing
    assert (found.forward, found.site, found.kind, found.finite) == (True, "lm_head", "overflow", False)
    assert found.reference is not None
    assert found.reference > 65504
    wide = by_hand(torch.float32, 2.0**19)
    lost = [name for name, grad in by_hand(torch.float16, 2.0**19).items() if not bool(grad.isfinite().all())]
    assert list(found.lost) == lost
    largest = next(k for k in range(18, -25, -1) if finite(by_hand(torch.float16, 2.0**k)))
    smaller = found["smaller loss scale"]
    assert smaller.loss_scale == 2.0**largest
    assert smaller.cured
    assert smaller.distance is not None
    mean, most = error(by_hand(torch.float16, 2.0**largest), wide)
    assert smaller.distance.error_mean == pytest.approx(mean, rel=1e-3)
    assert smaller.distance.error_max == pytest.approx(most, rel=1e-3)
    other = found["bfloat16"].distance
    assert other is not None
    assert other.error_mean == pytest.approx(error(by_hand(torch.bfloat16, 2.0**19), wide)[0], rel=1e-3)
    assert found["float32"].cured
    assert found["float32"].distance is not None
    assert found["float32"].distance.error_max == 0


def test_it_is_said(overflowing: TrainingDiagnosis) -> None:
    assert "The forward pass is finite: it peaks at" in overflowing.advice
    assert "The gradient of lm_head overflows at loss scale 2^19" in overflowing.advice
    assert "smaller loss scale (2^" in overflowing.advice
    assert "float16 overflows in the gradient of lm_head" in overflowing.verdict
    assert "untried" not in overflowing.verdict
    console = Console(width=200, file=io.StringIO(), record=True)
    print_blocks(blocks(overflowing), console)
    shown = console.export_text()
    assert "cures it" in shown


def test_random_numbers_go_on_as_if_nothing_had_been_drawn() -> None:
    def make(dtype: torch.dtype) -> Any:
        model = nn.Linear(4, 4).to(dtype)  # weights are drawn
        optimizer = torch.optim.Adam(model.parameters())
        return model, {"input": torch.ones(1, 4, dtype=dtype)}, lambda output: output.float().sum(), optimizer

    draws = torch.get_rng_state()
    assert not diagnose_training(make, loss_scale=2.0**20).finite
    assert torch.equal(torch.get_rng_state(), draws)


def test_it_is_a_document(overflowing: TrainingDiagnosis) -> None:
    written = to_document(overflowing)
    assert to_document(from_document(TrainingDiagnosis, written)) == written


def test_a_step_that_is_well_is_said_to_be() -> None:
    found = diagnose_training(llama, loss_scale=1024.0)
    assert found.finite
    assert "Every gradient is finite" in found.advice
    assert {trial.name for trial in found.trials} == {"bfloat16", "float32"}


def test_an_eps_that_float16_rounds_to_zero() -> None:
    def make(dtype: torch.dtype) -> Made:
        return llama(dtype, torch.optim.Adam)

    found = diagnose_training(make, loss_scale=1024.0)
    assert (found.plain.gradients, found.plain.weights) == (True, False)
    torch.manual_seed(0)
    model, kwargs, loss, optimizer = llama(torch.float16, torch.optim.Adam, eps=1e-7)
    (loss(model(**kwargs)) * 1024.0).backward()
    for held in model.parameters():
        assert held.grad is not None
        held.grad.div_(1024.0)
    optimizer.step()
    assert all(bool(held.isfinite().all()) for held in model.parameters()) == found["larger eps"].cured
    assert found["master weights"].cured
    assert "although every gradient is" in found.advice


def test_a_step_that_fails_twice_over_is_cured_by_two_changes_at_once() -> None:
    """Gradients overflow, and with a loss scale at which they do not, Adam divides by 0: neither change does alone."""

    def make(dtype: torch.dtype) -> Made:
        return llama(dtype, torch.optim.Adam)

    found = diagnose_training(make, loss_scale=2.0**19)
    scale = found["smaller loss scale"].loss_scale
    assert found["smaller loss scale"].failures == {"weights"}
    assert found["larger eps"].failures == {"gradients"}
    pair = next(trial for trial in found.trials if trial.together == ("smaller loss scale", "larger eps"))
    eps = float(pair.command.rpartition("eps=")[2].rstrip(")"))
    assert pair.name == f"loss scale {scale:,.0f} and eps 1e-{round(-math.log10(eps))}"
    assert f"init_scale={scale}" in pair.command.replace(f"2.0**{round(math.log2(scale))}", str(scale))
    assert "Both are needed: loss scale" in found.advice
    assert pair in found.pairs

    def moved(dtype: torch.dtype, eps: float) -> float:
        torch.manual_seed(0)
        model, kwargs, loss, optimizer = llama(dtype, torch.optim.Adam, eps=eps)
        before = [held.detach().double() for held in model.parameters()]
        (loss(model(**kwargs)) * scale).backward()
        for held in model.parameters():
            assert held.grad is not None
            held.grad.div_(scale)
        optimizer.step()
        return max(
            float((after.detach().double() - old).abs().max())
            for old, after in zip(before, model.parameters(), strict=True)
        )

    usual = moved(torch.float32, 1e-8)
    assert moved(torch.float16, 1e-7) > 1000 * usual  # finite, and thrown away all the same
    assert moved(torch.float16, eps) < 3 * usual


class Steep(nn.Module):
    """A sum of two layers, the second of which gives a large gradient to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.steep = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        for weight, power in zip(self.parameters(), (-9, -8, 8), strict=True):
            nn.init.constant_(weight, 2.0**power)

    def forward(self, x: Tensor) -> Tensor:
        return self.steep(self.first(x))


def steep(dtype: torch.dtype) -> Made:
    model = Steep().to(dtype)
    x = torch.ones(1, 4).to(dtype)
    return model, {"x": x}, lambda output: output.float().sum(), torch.optim.SGD(model.parameters(), lr=1e-3)


def test_one_module_in_float32_cures_what_overflows_in_it() -> None:
    found = diagnose_training(steep, loss_scale=128.0)  # 128 · 2^8 · 4 overflows; times 2^-8 it fits again
    assert (found.site, found.kind, found.value) == ("steep.0", "overflow", 131072.0)
    trial = found["float32 operator"]
    assert trial.cured
    assert trial.summary.startswith("steep in float32")
    assert found["smaller loss scale"].loss_scale == 32.0


@pytest.mark.parametrize("back", [True, False])
def test_a_widened_module_computes_in_float32_and_is_left_as_it_was(back: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(8, 8).half()
    x = torch.randn(3, 8).half().requires_grad_()
    wide = nn.functional.linear(x.detach().float(), module.weight.detach().float(), module.bias.detach().float())
    with widened(module, back=back):
        output = module(x)
        output.float().sum().backward()
    assert torch.equal(output, wide.half() if back else wide)
    assert module.weight.dtype == torch.float16
    assert module.weight.grad is not None
    assert torch.equal(module.weight.grad, x.detach().float().sum(0).expand(8, 8).half())
    assert "forward" not in vars(module)
    assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))


def test_gradients_that_underflow() -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    def make(dtype: torch.dtype) -> Made:
        model = Faint().to(dtype)
        x = torch.ones(1, 4).to(dtype)
        return model, {"x": x}, lambda y: y.float().sum() * 1e-8, torch.optim.SGD(model.parameters(), lr=1.0)

    found = diagnose_training(make, loss_scale=1.0)
    assert found.plain.distance is not None
    assert found.plain.distance.underflow == 1.0
    assert not found.plain.cured
    larger = found["larger loss scale"]
    assert larger.cured
    assert larger.distance is not None
    assert larger.distance.underflow == 0
    assert larger.distance.unscaled == 1.0  # divided in float16 they are 0 all the same
    assert found["master weights"].loss_scale == 1.0


def test_clipping_before_and_after_unscaling() -> None:
    found = diagnose_training(llama, loss_scale=1024.0, clip=1e-2)
    assert found.plain.cured

    def make(dtype: torch.dtype) -> Made:
        model = nn.Linear(2, 2, bias=False).to(dtype)
        nn.init.constant_(model.weight, 1.0)
        x = torch.full((1, 2), 1.0).to(dtype)
        return model, {"input": x}, lambda y: y.float().sum() * 60000, torch.optim.SGD(model.parameters(), lr=1e-8)

    found = diagnose_training(make, loss_scale=1.0, clip=1.0)  # each is 60,000, their norm 120,000
    assert (found.plain.gradients, found.plain.norm) == (True, 120000.0)
    assert "overflows float16, though none of them does" in found.advice
    assert not found.plain.cured
    assert not found["clipping before unscaling"].cured
    assert found["clipping in float32"].cured


def test_random_numbers_and_misuse() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    diagnose_training(steep, loss_scale=1.0)
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(MisuseError, match="loss_scale has to be a finite number above 0"):
        diagnose_training(steep, loss_scale=0.0)
    with pytest.raises(MisuseError, match="has to return \\(model, kwargs, loss, optimizer\\)"):
        diagnose_training(lambda dtype: steep(dtype)[:2])  # type: ignore[arg-type, return-value]
    with pytest.raises(MisuseError, match="scalar"):
        diagnose_training(lambda dtype: (*steep(dtype)[:2], lambda y: y, steep(dtype)[3]))
    with pytest.raises(MisuseError, match="Unknown number format"):
        diagnose_training(steep, dtype="float17")
