import pytest
import torch

from stabilitykit.checkpoints import RELEASED, parameter_shapes, random_checkpoint
from stabilitykit.errors import CheckpointError, MisuseError

TINY = "hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=8&vocabulary=300"


@pytest.mark.parametrize("size", RELEASED)
def test_every_released_size_has_its_shapes_and_no_other_tensors(size: str) -> None:
    checkpoint = random_checkpoint(f"random:{size}?layers=2&{TINY}")
    assert {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()} == parameter_shapes(
        checkpoint.config
    )
    assert checkpoint.config.generation == RELEASED[size].generation
    assert ("layers.1.self_attn.q_norm.weight" in checkpoint.tensors) == (checkpoint.config.generation == 3)
    assert ("layers.1.pre_feedforward_layernorm.weight" in checkpoint.tensors) == (checkpoint.config.generation > 1)


@pytest.mark.parametrize(
    ("size", "billions"),
    [("gemma-2b", 2.506), ("gemma-7b", 8.538), ("gemma2-2b", 2.614), ("gemma2-27b", 27.227), ("gemma3-270m", 0.268)],
)
def test_shapes_add_up_to_the_published_number_of_parameters(size: str, billions: float) -> None:
    count = sum(torch.Size(shape).numel() for shape in parameter_shapes(RELEASED[size]).values())
    assert count / 1e9 == pytest.approx(billions, abs=5e-4)


def test_weights_are_the_same_each_time_and_follow_the_seed() -> None:
    name = "layers.0.mlp.up_proj.weight"
    first = random_checkpoint(f"random:270m?layers=2&{TINY}")
    again = random_checkpoint(f"random:270m?{TINY}&layers=2&seed=0")
    other = random_checkpoint(f"random:270m?layers=2&{TINY}&seed=1")
    assert torch.equal(first.tensors[name], again.tensors[name])
    assert torch.equal(first.tensors[name], first.tensors[name])
    assert (first.sha256, first.source) == (again.sha256, again.source)
    assert not torch.equal(first.tensors[name], other.tensors[name])
    assert first.sha256 != other.sha256


def test_tensors_of_one_shape_differ() -> None:
    tensors = random_checkpoint(f"random:270m?layers=2&{TINY}").tensors
    assert not torch.equal(tensors["layers.0.mlp.gate_proj.weight"], tensors["layers.0.mlp.up_proj.weight"])
    assert not torch.equal(tensors["layers.0.mlp.gate_proj.weight"], tensors["layers.1.mlp.gate_proj.weight"])


def test_a_further_layer_changes_no_other_weight() -> None:
    two = random_checkpoint(f"random:gemma2-2b?layers=2&{TINY}")
    three = random_checkpoint(f"random:gemma2-2b?layers=3&{TINY}")
    assert all(torch.equal(tensor, three.tensors[name]) for name, tensor in two.tensors.items())


def test_weights_have_the_scale_of_a_working_model_and_fit_bfloat16() -> None:
    tensors = random_checkpoint("random:270m?layers=1&vocabulary=4096").tensors
    assert tensors["embed_tokens.weight"].std().item() == pytest.approx(640**-0.5, rel=0.01)
    assert tensors["layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(2048**-0.5, rel=0.01)
    assert tensors["norm.weight"].std().item() == pytest.approx(0.1, rel=0.2)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())


def test_any_number_of_the_config_can_be_changed() -> None:
    config = random_checkpoint("random:2b-v2?window=8&global_every=3&logit_softcap=none&rope_scaling=8").config
    assert (config.window, config.global_every, config.logit_softcap, config.rope_scaling) == (8, 3, None, 8.0)
    assert config.attention_softcap == 50.0


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        (
            "depth=2",
            "Unknown key 'depth' in a random checkpoint; choose one of: seed, layers, hidden_size, .*, rms_eps\\.$",
        ),
        ("layers", "layers of a random checkpoint must be a positive integer, got ''"),
        ("layers=2.5", "layers of a random checkpoint must be a positive integer, got '2.5'"),
        ("layers=0", "layers of a random checkpoint must be a positive integer, got '0'"),
        ("layers=none", "layers of a random checkpoint must be a positive integer, got 'none'"),
        ("rope_base=nan", "rope_base of a random checkpoint must be a positive number, got 'nan'"),
        ("rope_base=-1", "rope_base of a random checkpoint must be a positive number, got '-1'"),
        ("seed=x", "seed of a random checkpoint must be an integer, got 'x'"),
        ("generation=2", "Unknown key 'generation' in a random checkpoint"),
    ],
)
def test_what_cannot_be_meant_is_said(query: str, sentence: str) -> None:
    with pytest.raises(MisuseError, match=sentence):
        random_checkpoint(f"random:270m?{query}")


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    assert len(random_checkpoint("random:270m?vocabulary=263").vocabulary.pieces) == 263
    with pytest.raises(CheckpointError, match=r"at least 263 pieces.*, got 262"):
        random_checkpoint("random:270m?vocabulary=262")
