"""Bytes of one prefill, counted by running a model that has no values."""

import math
from dataclasses import replace
from functools import lru_cache

import torch

from stabilitykit.checkpoints.config import GemmaConfig
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.errors import MisuseError
from stabilitykit.models.allocations import peak_bytes
from stabilitykit.models.devices import parse_device, parse_dtype
from stabilitykit.models.gemma.kv_cache import KVCache
from stabilitykit.models.gemma.model import blank
from stabilitykit.models.gemma.query_blocks import WHOLE
from stabilitykit.models.matmul import BUFFER
from stabilitykit.models.memory import must_stream
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


def beside_weights(config: GemmaConfig, dtype: str, length: int, *, matmul: str, device: str) -> int:
    """Bytes of cache and activations of a prefill, by which to decide whether weights are streamed.

    Counting them runs the model without values, which takes longer than a short prompt does. Where even `at_most` so
    many are free beside the weights, it is that number; the decision is the same.
    """
    weights = sum(map(math.prod, parameter_shapes(config).values())) * parse_dtype(dtype).itemsize
    most = at_most(config, length)
    if not must_stream(None, weights + most, parse_device(device)):
        return most
    found = footprint(config, dtype, length, matmul=matmul, device=device)
    return found.cache + found.activations


def at_most(config: GemmaConfig, length: int) -> int:
    """Bytes that the cache and the activations of a prefill stay below, in any dtype and however products are summed:
    as if all that two layers make were there at once, in float64.
    """
    heads = (config.heads + config.kv_heads) * config.head_dim
    vectors = length * (20 * config.hidden_size + 20 * heads + 6 * config.feed_forward)
    cache = 2 * config.layers * config.kv_heads * length * config.head_dim
    scores = 8 * config.heads * length * length if config.heads * length * length <= WHOLE else 8 * WHOLE
    return 8 * (2 * vectors + cache + scores + 2 * config.vocabulary + 2 * BUFFER)


def _few_layers(config: GemmaConfig) -> GemmaConfig:
    """The same model with two layers of each kind, local and global: activations of further ones are no more."""
    kinds = {config.is_global(index) for index in range(config.layers)}
    if len(kinds) == 1:
        return replace(config, layers=min(config.layers, 2))
    return replace(config, layers=min(config.layers, 4), global_every=2)
