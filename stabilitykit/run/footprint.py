"""Bytes of one prefill, computed from the config alone.

The forward pass of `gemma/model.py` is walked tensor by tensor, as it runs under `inference_mode` with transformers'
rounding.
"""

import math
from dataclasses import dataclass

import torch

from stabilitykit.checkpoints.config import GemmaConfig
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.errors import MisuseError
from stabilitykit.formats import number_format
from stabilitykit.models.gemma.query_blocks import query_blocks
from stabilitykit.models.matmul import BUFFER, blocks
from stabilitykit.models.memory import fits
from stabilitykit.records.sweep import Footprint


def footprint(
    config: GemmaConfig, dtype: str, length: int, *, matmul: str = "native", device: str = "cpu"
) -> Footprint:
    """Bytes of weights, KV cache, and activations of one prefill: one sequence of `length` tokens.

    The cache has room for exactly these tokens, and logits are the last token's. Activations are all other tensors of
    the pass, ids, masks, RoPE tables and copies in a wider dtype among them, at the moment at which they are most. With
    `matmul` other than "native" products of 16-bit tensors hold float32 copies of parts of their operands and results.
    What libraries take for themselves is not included. Raises MisuseError for an unknown dtype or a length below 1.
    """
    if length < 1:
        raise MisuseError(f"A length is at least 1 token; {length} is not.")
    size = number_format(dtype).bits // 8
    weights = sum(map(math.prod, parameter_shapes(config).values())) * size
    cache = 2 * config.layers * config.kv_heads * length * config.head_dim * size
    prefill = _Prefill(
        config=config,
        length=length,
        size=size,
        accumulates=size == 2 and matmul != "native",
        # CUDA's softmax reads float16 and computes float32 in one kernel; for bfloat16, and on a CPU, it is cast first.
        casts_scores=size == 2 and not (dtype == "float16" and device.startswith("cuda")),
    )
    prefill.run()
    return Footprint(dtype=dtype, length=length, device=device, weights=weights, cache=cache, activations=prefill.peak)


def must_stream(config: GemmaConfig, dtype: str, length: int, *, matmul: str, device: torch.device) -> bool:
    """Whether the model and one prefill of `length` tokens do not fit in the memory that is free on the device."""
    needs = footprint(config, dtype, length, matmul=matmul, device=device.type)
    return not fits(needs.weights + needs.cache + needs.activations, device)


@dataclass(slots=True, kw_only=True)
class _Prefill:
    """The tensors of a forward pass as bytes that come and go, in the order of `gemma/model.py`, method by method.

    A method that stands for an expression returns the bytes of its result, which its caller frees where the name
    that holds the tensor is bound anew or goes out of scope. Arguments stay alive during a call.
    """

    config: GemmaConfig
    length: int
    size: int  # bytes of an element of the model's dtype
    accumulates: bool
    casts_scores: bool
    buffer: int = 0
    live: int = 0
    peak: int = 0

    @property
    def wide(self) -> int:
        """Bytes of an element where the model computes in at least float32."""
        return max(4, self.size)

    def new(self, elements: int, size: int | None = None) -> int:
        taken = elements * (self.size if size is None else size)
        self.live += taken
        self.peak = max(self.peak, self.live)
        return taken

    def free(self, *taken: int) -> None:
        self.live -= sum(taken)

    def replaced(self, old: int, new: int) -> int:
        """`x = f(x)`: the old tensor lives until the new one is there."""
        self.free(old)
        return new

    def run(self) -> None:
        config, hidden = self.config, self.length * self.config.hidden_size
        self.new(self.length, 8)  # token ids
        by_blocks = bool(query_blocks(config.heads, self.length, self.length, None))
        for is_global in sorted({config.is_global(index) for index in range(config.layers)}):
            if not by_blocks:
                self.mask(self.length, self.length, windowed=not is_global and config.window is not None)
            self.rope()
        h = self.replaced(self.new(hidden), self.new(hidden))  # embedding rows, then times sqrt(hidden)
        for index in range(config.layers):
            window = None if config.is_global(index) else config.window
            h = self.replaced(h, self.layer(window, by_blocks=by_blocks))
        self.replaced(h, self.norm(self.length, config.hidden_size))
        logits = self.product(1, config.hidden_size, config.vocabulary)
        if config.logit_softcap is not None:
            self.replaced(logits, self.soft_cap(config.vocabulary))

    def mask(self, queries: int, keys: int, *, windowed: bool) -> int:
        positions = self.new(queries + keys, 8)
        allowed = self.new(queries * keys, 1)
        if windowed:
            first = self.new(queries, 8)
            inside = self.replaced(first, self.new(queries * keys, 1))
            both = self.new(queries * keys, 1)
            self.free(allowed, inside)
            allowed = both
        mask = self.new(queries * keys)
        self.free(positions, allowed)
        return mask

    def rope(self) -> None:
        elements = self.length * self.config.head_dim
        positions = self.replaced(self.new(self.length, 8), self.new(self.length, 4))
        angles = self.new(elements // 2, 4) + self.new(elements, 4)
        for _ in ("cos", "sin"):
            table = self.new(elements, 4)
            if self.size != 4:
                self.replaced(table, self.new(elements))
        self.free(positions, angles)

    def layer(self, window: int | None, *, by_blocks: bool) -> int:
        config, hidden = self.config, self.length * self.config.hidden_size
        x = self.norm(self.length, config.hidden_size)
        a = self.replaced(x, self.attention(window, by_blocks=by_blocks))
        if config.post_norms:
            a = self.replaced(a, self.norm(self.length, config.hidden_size))
        h = self.new(hidden)
        x = self.norm(self.length, config.hidden_size)
        m = self.replaced(x, self.mlp())
        if config.post_norms:
            m = self.replaced(m, self.norm(self.length, config.hidden_size))
        out = self.new(hidden)
        self.free(a, h, m)
        return out

    def attention(self, window: int | None, *, by_blocks: bool) -> int:
        config, length = self.config, self.length
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        q, k, v = (self.linear(config.hidden_size, width) for width in (queries, keys, keys))
        if config.query_key_norm:
            q = self.replaced(q, self.norm(length * config.heads, config.head_dim))
            k = self.replaced(k, self.norm(length * config.kv_heads, config.head_dim))
        q = self.replaced(q, self.rotated(length * queries))
        k = self.replaced(k, self.rotated(length * keys))
        # A single key/value head is repeated as a view.
        repeated = self.new(2 * length * queries) if config.heads > config.kv_heads > 1 else 0

        if by_blocks:
            out = self.new(length * queries)
            for block in query_blocks(config.heads, length, length, window):
                new, seen = block.stop - block.start, block.last_key - block.first_key
                mask = self.mask(new, seen, windowed=window is not None)
                self.free(*self.attend(new, seen), mask)
        else:
            out, scores, p = self.attend(length, length)
            self.free(scores, p)
            if length > 1 and config.heads > 1:  # else its transpose is contiguous already
                out = self.replaced(out, self.new(length * queries))
        projected = self.linear(queries, config.hidden_size)
        self.free(q, k, v, repeated, out)
        return projected

    def attend(self, queries: int, keys: int) -> tuple[int, int, int]:
        """The output of all heads, the scores and the probabilities, of so many queries that look at so many keys."""
        heads, channels = self.config.heads, self.config.head_dim
        elements = heads * queries * keys
        scores = self.product(queries, channels, keys, batch=heads)
        scores = self.replaced(scores, self.new(elements))  # times the query scale
        capped = 0 if self.config.attention_softcap is None else self.soft_cap(elements)
        scores = self.replaced(scores + capped, self.new(elements))  # plus the mask
        cast = self.new(elements, self.wide) if self.casts_scores else 0
        p = self.replaced(cast, self.new(elements, self.wide))
        if self.wide != self.size:
            p = self.replaced(p, self.new(elements))
        return self.product(queries, keys, channels, batch=heads), scores, p

    def mlp(self) -> int:
        hidden, inner = self.config.hidden_size, self.config.feed_forward
        gate = self.linear(hidden, inner)
        gate = self.replaced(gate, self.new(self.length * inner))
        up = self.linear(hidden, inner)
        gated = self.replaced(gate + up, self.new(self.length * inner))
        return self.replaced(gated, self.linear(inner, hidden))

    def norm(self, rows: int, channels: int) -> int:
        elements = rows * channels
        wide = self.new(elements, 4) if self.size == 2 else 0
        squares = self.new(elements, self.wide)
        mean = self.replaced(squares, self.new(rows, self.wide))
        normed = self.replaced(mean, self.new(elements, self.wide))
        weight = self.new(channels, 4) if self.size == 2 else 0
        gain = self.replaced(weight, self.new(channels, self.wide))
        out = self.new(elements, self.wide)
        if self.size == 2:
            out = self.replaced(out, self.new(elements))
        self.free(wide, normed, gain)
        return out

    def rotated(self, elements: int) -> int:
        by_cos = self.new(elements)
        turned = self.replaced(self.new(elements // 2), self.new(elements))
        by_sin = self.replaced(turned, self.new(elements))
        return self.replaced(by_cos + by_sin, self.new(elements))

    def soft_cap(self, elements: int) -> int:
        scaled = self.new(elements)
        bounded = self.replaced(scaled, self.new(elements))
        return self.replaced(bounded, self.new(elements))

    def linear(self, inputs: int, outputs: int) -> int:
        return self.product(self.length, inputs, outputs)

    def product(self, rows: int, inner: int, columns: int, *, batch: int = 1) -> int:
        """`batch` products of matrices, as `products.py` makes them where it sums in float32."""
        if not self.accumulates:
            return self.new(batch * rows * columns)
        height, width = blocks(batch, inner)
        if rows <= height and columns <= width:
            wide = self.new(batch * rows * inner, 4)
            self.widened(batch * inner * columns)
            return self.replaced(wide + self.new(batch * rows * columns, 4), self.new(batch * rows * columns))
        out = self.new(batch * rows * columns)
        height, width = min(height, rows), min(width, columns)
        wide = self.new(batch * height * inner, 4)
        self.widened(batch * inner * width)
        self.free(wide, self.new(batch * height * width, 4), self.new(batch * height * width))
        return out

    def widened(self, elements: int) -> None:
        """The buffer for part of a right operand stays, and is replaced where it is too small."""
        needed = 4 * max(BUFFER, elements)
        if needed > self.buffer:
            self.free(self.buffer)
            self.buffer = self.new(needed, 1)
