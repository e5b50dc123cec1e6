"""Stress changes magnitudes and nothing else: of the kit's own Gemma, and of what transformers runs."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.choices import RoundingName
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import ROUNDINGS, Gemma, KVCache, RMSNorm, build
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.scaling.stress import stress_of_gemma
from stabilitykit.scaling.stressed import stressed

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
    model = stressed(checkpoint, gamma, rounding=rounding)
    assert model.rescale == gamma
    assert torch.equal(model(TOKENS), build(checkpoint, rounding=rounding)(TOKENS))


@pytest.mark.parametrize("gamma", [0.125, 64.0])
def test_the_residual_stream_is_scaled(checkpoint: Checkpoint, gamma: float) -> None:
    """Everything that a norm reads is γ times what it was; q·kᵀ, gate · up and logits are not."""
    calm, loud = inputs_of_norms(build(checkpoint)), inputs_of_norms(stressed(checkpoint, gamma))
    assert len(calm) == {1: 7, 2: 17, 3: 25}[checkpoint.config.generation]
    for name, value in calm.items():
        assert torch.equal(loud[name], value * gamma), name


def inputs_of_norms(model: Gemma) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
    model(TOKENS)
    return seen


def test_what_no_norm_reads_is_as_it_was(checkpoint: Checkpoint) -> None:
    calm, loud = (
        {name: weight.clone() for name, weight in model.named_parameters()}
        for model in (build(checkpoint), stressed(checkpoint, 4.0))
    )
    read = {"embed_tokens", "o_proj", "down_proj"}
    if checkpoint.config.query_key_norm:
        read |= {"q_proj", "k_proj"}
    for name, weight in calm.items():
        factor = 4.0 if name.removesuffix(".weight").rpartition(".")[2] in read else 1.0
        assert torch.equal(loud[name], weight * factor), name


def test_a_checkpoint_is_never_written_to(checkpoint: Checkpoint) -> None:
    before = {name: weight.clone() for name, weight in checkpoint.tensors.items()}
    model = stressed(checkpoint, 4.0)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert all(torch.equal(checkpoint.tensors[name], weight) for name, weight in before.items())


def test_eps_must_follow(checkpoint: Checkpoint) -> None:
    """What the test of bitwise equality would miss if it could not fail."""
    model = stressed(checkpoint, 0.125)
    assert model.config.rms_eps == checkpoint.config.rms_eps / 64
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-6
    assert not torch.equal(model(TOKENS), build(checkpoint)(TOKENS))


def test_gains_must_not_be_rounded(checkpoint: Checkpoint) -> None:
    """They are scaled outside their weights. Inside them float32 would round, and the logits would move."""
    model = stressed(checkpoint, 2.0**8)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.data = (1 + module.weight) * module.scale - 1
            module.scale = 1.0
    assert not torch.equal(model(TOKENS), build(checkpoint)(TOKENS))


def test_steps_with_a_cache_and_streamed_weights_keep_every_bit(checkpoint: Checkpoint) -> None:
    found = []
    for model in (build(checkpoint), stressed(checkpoint, 64.0), stressed(checkpoint, 64.0, stream=True)):
        cache = KVCache(model.config, batch=2, length=40, dtype=model.dtype)
        found.append([model(TOKENS, cache=cache), *(model(TOKENS[:, n : n + 1], cache=cache) for n in range(3))])
    plain, *others = found
    assert all(torch.equal(one, two) for other in others for one, two in zip(plain, other, strict=True))


def test_float16_breaks_on_demand_and_bfloat16_does_not(checkpoint: Checkpoint) -> None:
    assert build(checkpoint, dtype="float16")(TOKENS).isfinite().all()
    assert not stressed(checkpoint, 2.0**14, dtype="float16")(TOKENS).isfinite().all()
    calm, loud = (stressed(checkpoint, gamma, dtype="bfloat16")(TOKENS) for gamma in (1.0, 2.0**14))
    assert torch.equal(calm, loud)


def test_weights_are_scaled_before_they_are_cast(checkpoint: Checkpoint) -> None:
    """float16 subnormals round once, as in an exported checkpoint."""
    model = stressed(checkpoint, 2.0**-10, dtype="float16")
    expected = (checkpoint.tensors["embed_tokens.weight"] * 2.0**-10).half()
    assert torch.equal(model.embed_tokens.weight, expected)
    cast_first = checkpoint.tensors["embed_tokens.weight"].half() * 2.0**-10
    assert not torch.equal(expected, cast_first)


def test_notes_and_facts_say_so(checkpoint: Checkpoint) -> None:
    assert stressed(checkpoint, 2.0**-3).notes == (*checkpoint.notes, "scaled by 2^-3")
    unscaled = stressed(checkpoint, 1.0)
    assert (unscaled.notes, unscaled.rescale, unscaled.scaling) == (checkpoint.notes, 1.0, Scaling())


def test_a_scaling_may_leave_the_embedding_as_it_is(checkpoint: Checkpoint) -> None:
    """Here up against down, in one layer."""
    inner = {"up_proj": 3, "down_proj": -3}
    parameters = {f"layers.1.mlp.{name}.weight": Factor(exponents=(e,)) for name, e in inner.items()}
    model = build(checkpoint, scaling=Scaling(parameters=parameters))
    assert torch.equal(model(TOKENS), build(checkpoint)(TOKENS))
    up = "layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(up), checkpoint.tensors[up] * 8)
    assert (model.rescale, model.notes[-1]) == (1.0, "scaled by powers of two")


@pytest.mark.parametrize("gamma", [0.1875, 3, 0, -2, 2.0**25, 2.0**-25, math.inf, math.nan])
def test_other_factors_are_refused(checkpoint: Checkpoint, gamma: float) -> None:
    with pytest.raises(MisuseError, match=r"power of two from 2\^-24 to 2\^24.* is not"):
        stressed(checkpoint, gamma)


def test_the_size_of_a_model_does_not_matter(checkpoint: Checkpoint) -> None:
    larger = replace(checkpoint.config, hidden_size=640, vocabulary=1000, feed_forward=1024)
    assert stress_of_gemma(larger, 4.0) == stress_of_gemma(checkpoint.config, 4.0)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (Scaling(parameters={"layers.0.nothing.weight": Factor(exponents=(1,))}), "layers.0.nothing.weight is scaled"),
        (Scaling(parameters={"lm_head.weight": Factor(exponents=(1,))}), "lm_head.weight is scaled in another way"),
        (
            Scaling(parameters={"embed_tokens.weight": Factor(exponents=(1, 2), ends={0: (10, 400)})}),
            "by whole tensors.*embed_tokens.weight is scaled in another way",
        ),
        (Scaling(parameters={"norm.weight": Factor(exponents=(1,))}), r"gains 1 \+ w.*norm.weight is scaled"),
        (Scaling(parameters={"embed_tokens.weight": Factor(exponents=(1,), added=1.0)}), "embed_tokens.weight is"),
        (Scaling(settings={"rms_norm_eps": 2}), "as rms_eps is; got 'rms_norm_eps'"),
        (Scaling(settings={"layers": 2}), "got 'layers'"),
    ],
)
def test_a_scaling_of_something_else_is_refused(checkpoint: Checkpoint, scaling: Scaling, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        build(checkpoint, scaling=scaling)


@pytest.mark.parametrize("gamma", [0.125, 0.25, 2.0, 64.0])
def test_270m_logits_are_bitwise_equal(checkpoint_270m: Checkpoint, logits_270m: Tensor, gamma: float) -> None:
    assert torch.equal(stressed(checkpoint_270m, gamma)(TOKENS[:1]), logits_270m)


@pytest.fixture(scope="module")
def logits_270m(checkpoint_270m: Checkpoint) -> Tensor:
    logits: Tensor = build(checkpoint_270m)(TOKENS[:1])
    return logits
