"""The sampler against a plain numpy reading of gemma_pytorch's semantics, and its failures for real."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stabilitykit.errors import SamplingError
from stabilitykit.models.gemma import sampler as sampler_module
from stabilitykit.models.gemma.sampler import Sampler

TORCH_MESSAGE = r"probability tensor contains either `inf`, `nan` or element < 0"
sample = Sampler()


def reference(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """Probabilities of one row, in float64, token by token in falling order."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    kept = np.zeros_like(p)
    before = 0.0
    for rank, token in enumerate(np.argsort(-p, kind="stable")):
        if before <= top_p and rank < top_k:
            kept[token] = p[token]
        before += p[token]
    return kept / kept.sum()


def probabilities(monkeypatch: pytest.MonkeyPatch, logits_bv: Tensor, **settings: float) -> Tensor:
    """What the sampler hands to `torch.multinomial`."""
    seen = []

    def multinomial(p: Tensor, **_: object) -> Tensor:
        seen.append(p)
        return p.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    sample(logits_bv, **settings)
    return seen[0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 64, 1000])
def test_probabilities_are_the_references(
    monkeypatch: pytest.MonkeyPatch, temperature: float, top_p: float, top_k: int
) -> None:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * 3
    p = probabilities(monkeypatch, logits, temperature=temperature, top_p=top_p, top_k=top_k)
    for row, expected in zip(p, logits.numpy(), strict=True):
        np.testing.assert_allclose(row.numpy(), reference(expected, temperature, top_p, top_k), rtol=1e-4, atol=1e-7)


def test_top_p_keeps_the_token_that_crosses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8: before the third token lies 3/4, which is not above 3/4."""
    logits = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log()
    p = probabilities(monkeypatch, logits, temperature=1.0, top_p=0.75, top_k=64)
    np.testing.assert_allclose(p[0].numpy(), [4 / 7, 2 / 7, 1 / 7, 0], rtol=1e-6)


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(20_000, -1), temperature=1.0, top_p=1.0, top_k=3, generator=generator)
    share = np.bincount(drawn.numpy(), minlength=4) / 20_000
    np.testing.assert_allclose(share, reference(logits[0].numpy(), 1.0, 1.0, 3), atol=0.015)


@settings(max_examples=50, deadline=None)
@given(
    row=st.lists(st.floats(-50, 50, width=16), min_size=2, max_size=40),
    temperature=st.floats(0.1, 4.0),
    top_p=st.floats(0.0, 1.0),
    top_k=st.integers(1, 50),
    seed=st.integers(0, 2**32),
)
def test_only_kept_tokens_are_drawn(row: list[float], temperature: float, top_p: float, top_k: int, seed: int) -> None:
    logits = torch.tensor([row])
    generator = torch.Generator().manual_seed(seed)
    token = sample(logits, temperature=temperature, top_p=top_p, top_k=top_k, generator=generator).item()
    scaled = logits[0].double() / temperature
    larger = scaled > scaled[token] + 1e-5
    assert larger.sum() < top_k
    assert torch.softmax(scaled, -1)[larger].sum() <= top_p + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_left_alone(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 50).to(dtype)
    kept = logits.clone()
    token = sample(logits, temperature=0.5)
    assert torch.equal(logits, kept)
    assert token.shape == (2,)
    assert token.dtype == torch.int64


def test_greedy_takes_the_largest_and_hides_nan() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0], [torch.nan] * 3])
    assert sample(logits, temperature=None).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("setting", [{"top_k": 0}, {"top_p": -0.1}], ids=str)
def test_no_token_left_is_torchs_error(setting: dict[str, float], dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=TORCH_MESSAGE):
        sample(torch.randn(1, 20).to(dtype), **setting)


def test_small_temperature_breaks_float16_alone() -> None:
    logits = torch.tensor([[10.0, 9.0]])  # 1e5 at a temperature of 1e-4
    assert sample(logits, temperature=1e-4).tolist() == [0]
    assert sample(logits.bfloat16(), temperature=1e-4).tolist() == [0]
    with pytest.raises(RuntimeError, match=TORCH_MESSAGE):
        sample(logits.half(), temperature=1e-4)


def test_division_is_float32_rounded_to_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.3 is no float16; rounding it before the division would give other quotients."""
    logits = (torch.randn(1, 500, generator=torch.Generator().manual_seed(0)) * 4).half()
    p = probabilities(monkeypatch, logits, temperature=1.3, top_p=1.0, top_k=500)
    expected = torch.softmax((logits.float() / torch.tensor(1.3)).half().float(), -1)
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_logits_are_torchs_error(bad: float) -> None:
    with pytest.raises(RuntimeError, match=TORCH_MESSAGE):
        sample(torch.tensor([[1.0, bad, 0.0]]))


def test_off_the_cpu_the_look_comes_first() -> None:
    """On CUDA `torch.multinomial` asserts on the device; the check is the same code on any device."""
    p = torch.tensor([[0.5, 0.5], [torch.nan, 0.0], [0.2, 0.8]])
    sampler_module._refuse_non_probabilities(p[[0, 2]])
    with pytest.raises(SamplingError, match=TORCH_MESSAGE + r" \(in 1 of 3 sequences, the first is 1\)"):
        sampler_module._refuse_non_probabilities(p)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_survives() -> None:
    with pytest.raises(SamplingError, match=TORCH_MESSAGE):
        sample(torch.randn(1, 20, device="cuda"), top_k=0)
    assert sample(torch.tensor([[0.0, 50.0]], device="cuda")).tolist() == [1]
