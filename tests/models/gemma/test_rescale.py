"""Rescale changes magnitudes and nothing else."""

import math

import pytest
import torch
from torch import Tensor

from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.choices import RoundingName
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.load import build
from stabilitykit.models.gemma.model import ROUNDINGS, Gemma, RMSNorm
from stabilitykit.models.gemma.rescale import apply_rescale

SIZES = "hidden_size=64&feed_forward=96&heads=4&head_dim=16&vocabulary=400&query_scalar=16"
SOURCES = {
    "gemma 1": f"random:gemma-2b?layers=3&kv_heads=1&{SIZES}",
    "gemma 2": f"random:gemma2-2b?layers=4&kv_heads=2&window=6&{SIZES}",
    "gemma 3": f"random:gemma3-270m?layers=4&kv_heads=2&window=6&global_every=3&rope_scaling=8&{SIZES}",
}
GAMMAS = [2.0**-24, 2.0**-8, 0.125, 0.25, 2.0, 64.0, 2.0**14, 2.0**24]
TOKENS = torch.randint(4, 400, (2, 33), generator=torch.Generator().manual_seed(0))


class WithFullPrecision(dict[str, Tensor]):
    """A checkpoint's tensors times 1.1, so that every one needs all 24 bits of float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__({name: tensor * 1.1 for name, tensor in checkpoint.tensors.items()})


@pytest.fixture(params=list(SOURCES.values()), ids=list(SOURCES), scope="module")
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    drawn = random_checkpoint(request.param)
    return Checkpoint(
        source=drawn.source, sha256=drawn.sha256, config=drawn.config, tensors=WithFullPrecision(drawn),
        vocabulary=drawn.vocabulary,
    )  # fmt: skip


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_float32_logits_are_bitwise_equal(checkpoint: Checkpoint, gamma: float, rounding: RoundingName) -> None:
    rescaled = build(checkpoint, rescale=gamma, rounding=rounding)
    assert rescaled.rescale == gamma
    assert torch.equal(rescaled(TOKENS), build(checkpoint, rounding=rounding)(TOKENS))


@pytest.mark.parametrize("gamma", [0.125, 64.0])
def test_the_residual_stream_is_scaled(checkpoint: Checkpoint, gamma: float) -> None:
    """Everything that a norm reads is γ times what it was; q·kᵀ, gate · up and logits are not."""
    calm, rescaled = inputs_of_norms(build(checkpoint)), inputs_of_norms(build(checkpoint, rescale=gamma))
    assert len(calm) == {1: 7, 2: 17, 3: 25}[checkpoint.config.generation]
    for name, value in calm.items():
        assert torch.equal(rescaled[name], value * gamma), name


def inputs_of_norms(model: Gemma) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
    model(TOKENS)
    return seen


def test_applied_later_equals_applied_at_build(checkpoint: Checkpoint) -> None:
    model = build(checkpoint)
    before = {name: weight.clone() for name, weight in checkpoint.tensors.items()}
    apply_rescale(model, 16.0)
    apply_rescale(model, 0.25)
    expected = build(checkpoint, rescale=4.0)
    assert model.rescale == 4.0
    for (name, ours), (_, theirs) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    norms = [[(m.scale, m.eps) for m in each.modules() if isinstance(m, RMSNorm)] for each in (model, expected)]
    assert norms[0] == norms[1]
    assert model.lm_head.weight is model.embed_tokens.weight
    assert all(torch.equal(checkpoint.tensors[name], weight) for name, weight in before.items())


def test_eps_must_follow(checkpoint: Checkpoint) -> None:
    """What the test of bitwise equality would miss if it could not fail."""
    model = build(checkpoint, rescale=0.125)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-6
    assert not torch.equal(model(TOKENS), build(checkpoint)(TOKENS))


def test_float16_breaks_on_demand_and_bfloat16_does_not(checkpoint: Checkpoint) -> None:
    assert build(checkpoint, dtype="float16")(TOKENS).isfinite().all()
    assert not build(checkpoint, dtype="float16", rescale=2.0**14)(TOKENS).isfinite().all()
    calm, rescaled = (build(checkpoint, dtype="bfloat16", rescale=gamma)(TOKENS) for gamma in (1.0, 2.0**14))
    assert torch.equal(calm, rescaled)


def test_weights_are_scaled_before_they_are_cast(checkpoint: Checkpoint) -> None:
    """float16 subnormals round once, as in an exported checkpoint."""
    model = build(checkpoint, dtype="float16", rescale=2.0**-10)
    expected = (checkpoint.tensors["embed_tokens.weight"] * 2.0**-10).half()
    assert torch.equal(model.embed_tokens.weight, expected)
    cast_first = checkpoint.tensors["embed_tokens.weight"].half() * 2.0**-10
    assert not torch.equal(expected, cast_first)


@pytest.mark.parametrize("gamma", [0.1875, 3, 0, -2, 2.0**25, 2.0**-25, math.inf, math.nan])
def test_other_factors_are_refused(checkpoint: Checkpoint, gamma: float) -> None:
    with pytest.raises(MisuseError, match=r"power of two from 2\^-24 to 2\^24.* is not"):
        build(checkpoint, rescale=gamma)
    with pytest.raises(MisuseError, match=r"power of two from 2\^-24 to 2\^24.* is not"):
        apply_rescale(build(checkpoint), gamma)


def test_16_bit_models_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(MisuseError, match=r"already torch.float16. Pass rescale= to build or load"):
        apply_rescale(build(checkpoint, dtype="float16"), 2.0)


@pytest.mark.parametrize("gamma", [0.125, 0.25, 2.0, 64.0])
def test_270m_logits_are_bitwise_equal(checkpoint_270m: Checkpoint, logits_270m: Tensor, gamma: float) -> None:
    assert torch.equal(build(checkpoint_270m, rescale=gamma)(TOKENS[:1]), logits_270m)


@pytest.fixture(scope="module")
def logits_270m(checkpoint_270m: Checkpoint) -> Tensor:
    logits: Tensor = build(checkpoint_270m)(TOKENS[:1])
    return logits
