"""Small Gemmas in which it is known which tokens are dangerous."""

from dataclasses import replace

import torch
from remedied import SPECS
from torch import Tensor

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.random import random_checkpoint

# of the random vocabulary: 0 to 3 special, 4 to 259 bytes, 260 and 261 turns, 262 the space, then "!", '"' and so on
FIRST, SECOND = 300, 310
BOS = 2


def changed(opened: Checkpoint, **tensors: Tensor) -> Checkpoint:
    """With other tensors under these names, whose dots are written as two underscores."""
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return replace(opened, tensors={name: new.get(name, tensor) for name, tensor in opened.tensors.items()})


def dangerous(generation: int, token: int, size: float) -> Checkpoint:
    """A token whose embedding has `size` in one channel, in which the final norm has no gain: logits stay small."""
    opened = random_checkpoint(SPECS[generation])
    rows = opened.tensors["embed_tokens.weight"].clone()
    rows[token, 0] = size / opened.config.hidden_size**0.5
    norm = opened.tensors["norm.weight"].clone()
    norm[0] = -1.0
    return changed(opened, embed_tokens__weight=rows, norm__weight=norm)


def dangerous_pair(half: float = 50_000.0) -> Checkpoint:
    """A Gemma 1 in which `SECOND` brings `half` to a channel, and attention to `FIRST` as much again.

    Attention is even in its first layer: `FIRST` and then `SECOND` come to one and a half times `half`; each alone,
    twice or the other way round to no more than `half`.
    """
    opened = dangerous(1, SECOND, half)
    config = opened.config
    rows = opened.tensors["embed_tokens.weight"].clone()
    rows[:, 1] = 0.0
    rows[FIRST] = 0.0
    rows[FIRST, 1] = 1.0
    gain = 1 + opened.tensors["layers.0.input_layernorm.weight"][1]
    values = torch.zeros(config.kv_heads * config.head_dim, config.hidden_size)
    values[0, 1] = 1.0
    out = torch.zeros(config.hidden_size, config.heads * config.head_dim)
    out[0, 0] = half / (config.hidden_size**0.5 * gain)
    queries = torch.zeros(config.heads * config.head_dim, config.hidden_size)
    return changed(
        opened,
        embed_tokens__weight=rows,
        layers__0__self_attn__v_proj__weight=values,
        layers__0__self_attn__o_proj__weight=out,
        layers__0__self_attn__q_proj__weight=queries,
    )
