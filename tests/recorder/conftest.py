"""Small Gemmas of each generation, with every kind of layer, and prompts for them."""

from collections.abc import Callable

import pytest
import torch
from watched import LEVELS

from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.models.gemma import Gemma
from stabilitykit.records import Level
from stabilitykit.scaling.stressed import stressed

SHAPE = "layers=3&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&query_scalar=16&vocabulary=512"
SPECS = {
    1: f"random:gemma-2b?{SHAPE}",
    2: f"random:gemma2-2b?{SHAPE}&window=4",
    3: f"random:gemma3-270m?{SHAPE}&window=4&global_every=2",
}


@pytest.fixture(scope="session")
def small() -> Callable[..., Gemma]:
    """`small(generation, dtype="float32", rescale=1.0)`: a fresh model that a test may damage."""

    def make(generation: int, dtype: str = "float32", rescale: float = 1.0) -> Gemma:
        return stressed(random_checkpoint(SPECS[generation]), rescale, dtype=dtype)

    return make


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.tensor([[2, 70, 71, 72, 73, 74, 75]])


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Level:
    return request.param
