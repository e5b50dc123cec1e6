"""Small Gemmas in float16 of which one token breaks, and what is on a model."""

from torch import nn

from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.models.gemma import Gemma
from stabilitykit.scaling.stressed import stressed

SHAPE = "layers=3&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&query_scalar=16&vocabulary=512"
LARGE = 77
"""A token whose embedding is past float16's range once it is scaled."""


def gemma(dtype: str = "float16", *, planted: bool = True) -> Gemma:
    model = stressed(random_checkpoint(f"random:gemma3-270m?{SHAPE}&window=4&global_every=2"), 1.0, dtype=dtype)
    if planted:
        weight = model.embed_tokens.weight.detach().clone()
        weight[LARGE, 5] = 1.2e4  # times √32 on the way in, and no more on the way out
        model.embed_tokens.weight = model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def hooks(model: nn.Module) -> int:
    """How many hooks are on a model and in it."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
