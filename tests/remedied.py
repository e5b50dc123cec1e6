"""Small Gemmas of each generation, as checkpoints; with a rescale γ they break in float16."""

from functools import cache

import torch

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.models.gemma import build
from stabilitykit.remedies.rescale import rescale

SHAPE = "layers=3&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&vocabulary=512"
SPECS = {
    1: f"random:gemma-2b?{SHAPE}&query_scalar=16",  # Hugging Face has no other for generation 1
    2: f"random:gemma2-2b?{SHAPE}&window=4",
    3: f"random:gemma3-270m?{SHAPE}&window=4&global_every=2",
}
BREAKING = 2.0**15
TOKENS = torch.tensor([[2, 70, 71, 72, 73, 74, 75]])


@cache
def breaking(generation: int) -> float:
    """The least γ, a power of two, at which plain float16 breaks: in a sum of the residual stream."""
    for exponent in range(1, 18):
        with torch.inference_mode():
            logits = build(small(generation, 2.0**exponent), dtype="float16")(TOKENS)
        if not logits.isfinite().all():
            return 2.0**exponent
    raise AssertionError


def small(generation: int, gamma: float = 1.0) -> Checkpoint:
    """Weights that bfloat16 holds, as released ones are, times γ."""
    opened = random_checkpoint(SPECS[generation])
    return opened if gamma == 1 else rescale(opened, gamma).checkpoint
