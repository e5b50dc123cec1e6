"""A Gemma with gemma_pytorch's modules, names and calling convention, in its order of operators; written anew here."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabilitykit.checkpoints import GemmaConfig


class Architecture(Enum):
    GEMMA_1 = 1
    GEMMA_2 = 2
    GEMMA_3 = 3


@dataclass
class Config:
    architecture: Architecture
    sizes: GemmaConfig


class Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * (1 + self.weight.float())).type_as(x)


class Linear(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embedder(Linear):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Attention(nn.Module):
    def __init__(self, c: GemmaConfig) -> None:
        super().__init__()
        self.c = c
        self.qkv_proj = Linear(c.hidden_size, (c.heads + 2 * c.kv_heads) * c.head_dim)
        self.o_proj = Linear(c.heads * c.head_dim, c.hidden_size)
        self.query_norm = Norm(c.head_dim) if c.query_key_norm else None
        self.key_norm = Norm(c.head_dim) if c.query_key_norm else None

    def forward(self, hidden_states: Tensor, turns: Tensor, at: Tensor, kv_cache: Any, mask: Tensor) -> Tensor:
        c, (batch, length, _) = self.c, hidden_states.shape
        parts = self.qkv_proj(hidden_states).split([n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)], -1)
        q, k, v = (part.view(batch, length, -1, c.head_dim) for part in parts)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotated(q, turns), rotated(k, turns)
        for cache, new in zip(kv_cache, (k, v), strict=True):
            cache.index_copy_(1, at, new)
        keys, values = (cache.repeat_interleave(c.heads // c.kv_heads, dim=2).transpose(1, 2) for cache in kv_cache)
        q = q.transpose(1, 2)
        q.mul_(c.query_scalar**-0.5)
        scores = torch.matmul(q, keys.transpose(2, 3))
        if c.attention_softcap is not None:
            scores = torch.tanh(scores / c.attention_softcap) * c.attention_softcap
        scores = F.softmax((scores + mask).float(), dim=-1).type_as(q)
        out = torch.matmul(scores, values).transpose(1, 2).contiguous().view(batch, length, -1)
        made: Tensor = self.o_proj(out)
        return made


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.stack(x.transpose(1, 2).float().chunk(2, -1), -1)
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turns).type_as(x)
    return torch.cat(turned.unbind(-1), -1).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, c: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.feed_forward)
        self.up_proj = Linear(c.hidden_size, c.feed_forward)
        self.down_proj = Linear(c.feed_forward, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return made


class Layer(nn.Module):
    def __init__(self, c: GemmaConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = Norm(c.hidden_size), Norm(c.hidden_size)
        self.post_norms = c.post_norms
        if c.post_norms:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = Norm(c.hidden_size), Norm(c.hidden_size)

    def forward(self, hidden_states: Tensor, **how: Any) -> Tensor:
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **how)
        if self.post_norms:
            hidden_states = hidden_states + self.post_attention_layernorm(attended)
            made: Tensor = hidden_states + self.post_feedforward_layernorm(
                self.mlp(self.pre_feedforward_layernorm(hidden_states))
            )
            return made
        hidden_states = hidden_states + attended
        plain: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return plain


class Model(nn.Module):
    def __init__(self, c: GemmaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = Norm(c.hidden_size)

    def forward(self, hidden_states: Tensor, kv_caches: Any, **how: Any) -> Tensor:
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            hidden_states = layer(hidden_states=hidden_states, kv_cache=cache, **how)
        made: Tensor = self.norm(hidden_states)
        return made


class Sampler(nn.Module):
    def forward(self, embedding: Tensor, hidden_states: Tensor, output_positions: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.matmul(hidden_states.index_select(1, output_positions).squeeze(1), embedding.t())
        logits.div_(torch.ones(len(logits), 1))
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float)
        return torch.multinomial(probabilities, 1).squeeze(-1), logits


class GemmaForCausalLM(nn.Module):
    def __init__(self, c: GemmaConfig) -> None:
        super().__init__()
        self.config = Config(Architecture(c.generation), c)
        self.embedder, self.model, self.sampler = Embedder(c.hidden_size, c.vocabulary), Model(c), Sampler()

    def caches(self, length: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        c = self.config.sizes
        shape = (1, length, c.kv_heads, c.head_dim)
        return [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(c.layers)]

    @torch.no_grad()
    def forward(
        self, input_token_ids: Tensor, input_positions: Tensor, kv_caches: Any, mask: Tensor, output_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        c = self.config.sizes
        angles = 10_000.0 ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        turns = torch.polar(torch.ones(len(input_positions), len(angles)), input_positions[:, None] * angles)
        h = self.embedder(input_token_ids)
        h = h * torch.tensor(c.hidden_size**0.5, dtype=h.dtype)
        h = self.model(hidden_states=h, kv_caches=kv_caches, turns=turns, at=input_positions, mask=mask)
        drawn: tuple[Tensor, Tensor] = self.sampler(self.embedder.weight, h, output_positions)
        return drawn
