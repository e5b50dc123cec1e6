"""Bytes of one prefill, counted by running a model that has no values."""

import math
from dataclasses import replace
from functools import lru_cache

import torch

from stabilitykit.checkpoints.config import GemmaConfig
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.errors import MisuseError
from stabilitykit.models.allocations import peak_bytes
from stabilitykit.models.devices import parse_dtype
from stabilitykit.models.gemma.kv_cache import KVCache
from stabilitykit.models.gemma.model import blank
from stabilitykit.records.sweep import Footprint


@lru_cache(maxsize=256)  # of a plan's cases many have the same
def footprint(
    config: GemmaConfig, dtype: str, length: int, *, matmul: str = "native", device: str = "cpu"
) -> Footprint:
    """Bytes of weights, KV cache, and activations of one prefill: one sequence of `length` tokens.

    The cache is allocated for exactly these tokens, and logits are the last token's. Activations are all other tensors
    of the pass, ids, masks, RoPE tables and copies in a wider dtype among them, at the moment at which they are most.
    With `matmul` other than "native" products of 16-bit tensors hold float32 copies of parts of their operands and
    results. What libraries take for themselves is not included. Raises MisuseError for an unknown dtype or a length
    below 1.
    """
    if length < 1:
        raise MisuseError(f"A length is at least 1 token; {length} is not.")
    model = blank(_few_layers(config), parse_dtype(dtype))
    cache = KVCache(model.config, batch=1, length=length, dtype=model.dtype, device=model.device)
    activations = peak_bytes(
        lambda: model(torch.arange(length, device=model.device)[None], cache=cache, last_only=True),
        matmul=matmul,
        device=device,
    )
    size = model.dtype.itemsize
    return Footprint(
        dtype=dtype,
        length=length,
        device=device,
        weights=sum(map(math.prod, parameter_shapes(config).values())) * size,
        cache=2 * config.layers * config.kv_heads * length * config.head_dim * size,
        activations=activations,
    )


def _few_layers(config: GemmaConfig) -> GemmaConfig:
    """The same model with two layers of each kind, local and global: activations of further ones are no more."""
    kinds = {config.is_global(index) for index in range(config.layers)}
    if len(kinds) == 1:
        return replace(config, layers=min(config.layers, 2))
    return replace(config, layers=min(config.layers, 4), global_every=2)
