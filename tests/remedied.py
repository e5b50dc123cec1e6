"""Small Gemmas of each generation, as checkpoints; with a rescale γ they break in float16."""

from collections.abc import Sequence
from functools import cache

import torch

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.models.gemma import build
from stabilitykit.remedies.original import GemmaOriginal, scaled_checkpoint
from stabilitykit.remedies.proved import by_norms
from stabilitykit.remedies.remedy import Remedy
from stabilitykit.remedies.repair import scaling_remedy
from stabilitykit.remedies.samples import Samples
from stabilitykit.remedies.seen import Seen, look

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
    return rescale(opened, gamma)


def rescale(checkpoint: Checkpoint, gamma: float, inner: Sequence[float] = ()) -> Checkpoint:
    """Everything that a norm reads times γ: float32 logits stay."""
    return scaled_checkpoint(checkpoint, by_norms(checkpoint, gamma, inner))


def rescaling(checkpoint: Checkpoint, gamma: float) -> Remedy:
    return scaling_remedy(by_norms(checkpoint, gamma))


def looked(checkpoint: Checkpoint) -> Seen:
    """What one float32 run shows."""
    original = GemmaOriginal(checkpoint)
    return look(original, original.open(), [{"input_ids": TOKENS}])


def samples(*windows: Sequence[int], held_out: Sequence[Sequence[int]] = ()) -> Samples:
    """Windows of tokens that choose, and others that rank."""
    return Samples(
        choosing=tuple({"input_ids": torch.tensor([list(window)])} for window in windows),
        held_out=tuple({"input_ids": torch.tensor([list(window)])} for window in held_out),
    )
