"""What overflowed and ended on the way: harmless, or harmful and by how much, against the same computed by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from truth.decoders import linear
from truth.others import whisper_norm

import stabilitykit as sk
from stabilitykit.diagnosis.trials import advice
from stabilitykit.records.trials import Diagnosis, Harm
from stabilitykit.trials.diagnose import diagnose_run

HALF = torch.float16


class Code(nn.Module):
    """A few lines with a weight of ones."""

    def __init__(self, lines: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
        self.lines = lines

    def forward(self, x: Tensor) -> Tensor:
        return self.lines(self, x)


def norm(m: Any, x: Tensor) -> Tensor:
    """Its squares are past 65,504 in the second row, and what is divided by the root of infinity is 0."""
    return x / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight


def harm_of(found: Diagnosis) -> Harm:
    assert found.finite
    assert found.harm is not None
    return found.harm


def far(ours: Tensor, expected: Tensor) -> float:
    return float((ours.float() - expected).abs().max() / expected.abs().max())


ROWS = torch.tensor([[0.5, -1, 2, 1, -2, 0.25, 1, 1], [300.0, -20, 30, 11, -20, 2, 1, 1]], dtype=HALF)[None]


def test_squares_of_a_norm_that_overflow_make_a_row_zero() -> None:
    model = Code(norm).half()
    found = sk.diagnose(model, ROWS)
    harm = harm_of(found)
    x = ROWS.float()
    expected = x / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt()
    plain = norm(model, ROWS)
    assert not plain[0, 1].any()
    wide = ROWS / ((x * x).mean(-1, keepdim=True).half() + 1e-5).sqrt() * model.weight  # by hand, squares in float32
    assert harm.harmful
    assert harm.site == "/mul.0"
    assert harm.plain.error_max == pytest.approx(far(plain, expected))
    assert harm.without is not None
    assert harm.without.error_max == pytest.approx(far(wide, expected), rel=1e-3)
    assert harm.rows[0][1:3] == (0, 1)
    assert {row[1:3] for row in harm.rows} == {(0, 1)}  # the first row is what it should be
    assert found["float32 operator"].cured
    assert "finite and wrong" in found.advice


@pytest.mark.parametrize(
    "lines",
    [
        lambda m, x: 30 * torch.tanh((x * 1000) / 30) * m.weight,
        lambda m, x: x * torch.tanh(torch.log(1 + torch.exp(x / 20))) * m.weight,
        lambda m, x: torch.clamp(x * 1000, -50, 50) * m.weight,
    ],
    ids=["soft-cap", "mish", "clamp"],
)
def test_what_ends_as_the_true_value_would_is_harmless(lines: Callable[[Any, Tensor], Tensor]) -> None:
    model = Code(lines).half()
    found = sk.diagnose(model, ROWS)
    harm = harm_of(found)
    expected = lines(Code(lines), ROWS.float())
    assert not harm.harmful
    assert harm.plain.error_max == pytest.approx(far(lines(model, ROWS), expected), abs=1e-6)
    assert "no harm" in found.advice
    assert {one.name for one in found.trials} == {"bfloat16", "float32"}  # nothing to cure


def test_scores_that_are_soft_capped_are_harmless_and_their_distance_is_told() -> None:
    planted = linear("gemma2", "lm_head")
    harm = harm_of(diagnose_run(planted.model, planted.run))
    assert not harm.harmful
    assert harm.site == "lm_head"
    assert harm.plain.kl_mean is not None


def test_a_clamp_to_a_smaller_number_than_the_true_one_is_harmful() -> None:
    """As T5's code does in float16 alone: 64,504 in the place of 90,000, in one row."""

    def lines(m: Any, x: Tensor) -> Tensor:
        y = x * 300
        return (y.clamp(-64504, 64504) if y.dtype == HALF else y) / 300 * m.weight

    model = Code(lines).half()
    found = sk.diagnose(model, ROWS)
    harm = harm_of(found)
    assert harm.harmful
    assert harm.plain.error_max == pytest.approx(far(lines(model, ROWS), ROWS.float()))
    assert harm.plain.error_max == pytest.approx((90000 - 64504) / 90000, rel=1e-3)
    assert harm.without is not None
    assert harm.without.error_max == pytest.approx(0, abs=1e-3)
    assert harm.rows[0][2] == 1


def test_a_norm_of_whisper_spelled_out_in_half_is_harmful() -> None:
    planted = whisper_norm()
    harm = harm_of(diagnose_run(planted.model, planted.run))
    assert harm.harmful
    assert harm.site.endswith("/mul.0")


def test_logits_that_were_sanitised_are_harmful() -> None:
    """NaN that becomes 0: it looks healthy."""

    def lines(m: Any, x: Tensor) -> Tensor:
        y = x * 300
        return torch.nan_to_num((y - y.mean(-1, keepdim=True)) / 300, nan=0.0, posinf=6e4, neginf=-6e4) * m.weight

    found = sk.diagnose(Code(lines).half(), ROWS)
    assert harm_of(found).harmful
    assert harm_of(found).rows[0][2] == 1
    assert "float32 islands" in {one.name for one in found.cures}


def test_without_an_overflow_there_is_no_harm() -> None:
    assert sk.diagnose(Code(lambda m, x: x * m.weight).half(), ROWS).harm is None


def test_a_gradient_is_no_harm_to_what_is_returned() -> None:
    model = nn.Linear(4, 4, bias=False).half()

    def run(m: Any) -> Tensor:
        m.zero_grad()
        loss = m(torch.ones(1, 2, 4, dtype=HALF)).float().sum()
        (loss * 2.0**20).backward()
        detached: Tensor = loss.detach().reshape(1)
        return detached

    found = diagnose_run(model, run, grad=True)
    assert found.harm is None
    assert not found.finite
    assert "It is a gradient that is not finite" in found.advice


class TwoOutputs(nn.Module):
    """Of two outputs an overflow makes only the second one worse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight / 3, 1000 / (x * self.weight * 100)


def test_the_harm_is_that_of_the_outputs_that_are_worse() -> None:
    x = torch.tensor([[[100.0, 2, 3, 4, 5, 6, 7, 8], [900.0, 800, 700, 900, 900, 900, 900, 900]]])
    found = sk.diagnose(TwoOutputs().half(), x.half().clamp(min=100))
    harm = harm_of(found)
    assert harm.harmful
    assert {number for number, *_ in harm.rows} == {1}
    assert harm.plain.rows == 2  # of the second output alone
    assert harm.without is not None
    assert harm.without.rows == 2


def test_an_overflow_without_harm_is_not_called_wrong_and_nothing_is_advised() -> None:
    """What is divided by an infinity, beside numbers a million times as large."""
    model = Code(lambda m, x: x * m.weight + x / (x * x * 300))
    found = sk.diagnose(model.half(), ROWS)
    assert not harm_of(found).harmful
    assert "does no harm" in found.advice
    assert "wrong" not in found.verdict
    assert "Use a format" not in found.verdict


def test_what_was_tried_for_the_harm_keeps_its_command_and_its_memory() -> None:
    found = sk.diagnose(Code(norm).half(), ROWS)
    islands = found["float32 islands"]
    assert islands.cured
    assert "/mul.0" in islands.command
    assert islands.memory > 0


def test_harm_below_rounding_is_told_with_its_numbers() -> None:
    found = sk.diagnose(Code(lambda m, x: x * m.weight + x / (x * x * 300)).half(), ROWS)
    assert found.harm is not None
    near, nearer = (replace(found.harm.plain, error_max=far, kl_mean=None) for far in (1e-3, 1e-4))
    worse = replace(found, plain=near, harm=replace(found.harm, plain=near, without=nearer))
    assert "less harm than rounding does: what is returned is 0.1% of the largest value" in advice(worse)
    same = replace(found, plain=near, harm=replace(found.harm, plain=near, without=near))
    assert "no harm that can be measured" in advice(same)
