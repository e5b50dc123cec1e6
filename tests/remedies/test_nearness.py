"""Divergences of near and of far distributions, against float64 throughout."""

import math

import pytest
import torch
from torch import Tensor

from stabilitykit.remedies.nearness import Probabilities, nearness
from stabilitykit.run.divergence import Distribution, divergence


def pair(noise: float, scale: float = 5.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    theirs = scale * torch.randn(37, 500, generator=generator)
    return (theirs + noise * torch.randn(37, 500, generator=generator)).to(dtype), theirs


def in_float64(ours: Tensor, theirs: Tensor) -> Tensor:
    p, q = (one.double().log_softmax(-1) for one in (theirs, ours))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_divergences_are_those_of_float64(noise: float, dtype: torch.dtype) -> None:
    """Also where a logit is so far away that its exponential would overflow float32."""
    ours, theirs = pair(noise, dtype=dtype)
    found = nearness(ours, Probabilities.of(theirs))
    assert found.kl.dtype == torch.float64
    torch.testing.assert_close(found.kl, in_float64(ours, theirs), rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(found.log_totals, ours.double().logsumexp(-1), rtol=1e-6, atol=1e-5)
    assert torch.equal(found.same, ours.argmax(-1) == theirs.argmax(-1))
    assert found.error == pytest.approx(float((ours.float() - theirs).abs().max()))


def test_a_shift_of_all_logits_is_no_divergence() -> None:
    _, theirs = pair(0.0)
    found = nearness(theirs + 200.0, Probabilities.of(theirs))
    assert float(found.kl.abs().max()) < 1e-9
    assert found.error == pytest.approx(200.0, rel=1e-5)


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-8])
def test_of_rows_that_are_all_but_equal_rounding_leaves_no_negative_divergence(noise: float) -> None:
    """Here the sums come to less than 0, by 1e-26 in the one and 1e-16 in the other."""
    ours, theirs = pair(noise)
    for kl in (nearness(ours, Probabilities.of(theirs)).kl, divergence(ours, Distribution.of(theirs)).kl):
        assert float(kl.min()) >= 0.0
        torch.testing.assert_close(kl, in_float64(ours, theirs).clamp(min=0), rtol=0, atol=1e-14)


def test_positions_that_are_not_finite_are_left_out() -> None:
    ours, theirs = pair(1e-2)
    ours[3, 7], ours[5, 0], ours[8] = math.nan, math.inf, -math.inf
    found = nearness(ours, Probabilities.of(theirs))
    kept = [row for row in range(37) if row not in (3, 5, 8)]
    torch.testing.assert_close(found.kl, in_float64(ours[kept], theirs[kept]), rtol=1e-3, atol=1e-12)
    assert len(found.same) == 34
    assert not math.isfinite(found.error)
