"""Faults in decoders as they are used: caches, batches, beams, adapters, processors, wrappers and training."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from truth.decoders import AT, IDS, LAST, forward, generated, site
from truth.models import DECODERS, decoder
from truth.plants import answer, lost_places
from truth.row import Expected, Planted, Row

LEFT = torch.tensor([[0, 0, 0, 11, 12, 13], [21, 22, 23, 24, 25, 26]])
LEFT_MASK = (LEFT != 0).long()
NOT_PROBABILITIES = "^(?!.*probabilities)"


def batch(m: Any) -> Tensor:
    positions = (LEFT_MASK.cumsum(-1) - 1).clamp(min=0)
    return m(LEFT, attention_mask=LEFT_MASK, position_ids=positions).logits


def half_overflow(path: str, operator: str = "matmul", **rest: Any) -> Expected:
    usual: dict[str, Any] = {
        "channel": 0, "value": 80000.0, "step": 0, "outcome": "reached", "residual": operator == "matmul",
    }  # fmt: skip
    return Expected(sites=(path,), operators=(operator,), kinds=("overflow",), **usual | rest)


def in_batch(name: str, row: int, position: int) -> Planted:
    """One token of a batch that is padded on the left."""
    model, path = decoder(name), DECODERS[name].parts.down.format(1)
    answer(model, path, batch, {row * LEFT.shape[1] + position: 80000.0})
    model.half()

    def symptom(result: Tensor) -> None:
        places = lost_places(model, path, batch)
        assert {place[:2] for place in places} == {(row, position)}

    return Planted(
        model=model, run=batch, symptom=symptom,
        expected=half_overflow(
            site(path), row=row, rows=(row,), position=position, positions=(position,),
            token=int(LEFT[row, position]), says=(f"row {row}",),
        ),
    )  # fmt: skip


def padding(name: str) -> Planted:
    """The padding's own embedding breaks gate · up: only rows that are padded are lost, and there only the padding."""
    model, parts = decoder(name), DECODERS[name].parts
    embedding = model.get_submodule(parts.embedding).weight.data
    embedding[:, 0] = 0
    embedding[0] = 0
    embedding[0, 0] = 1
    for layer in (0, 1):
        model.get_submodule(parts.output.format(layer)).weight.data.zero_()
    model.get_submodule(parts.down.format(0)).weight.data.zero_()
    for path, value in ((str(parts.gate), 40.0), (parts.up, 40.0)):
        model.get_submodule(path.format(1)).weight.data[0] = 0
        model.get_submodule(path.format(1)).weight.data[0, 0] = value
    model.half()
    into = parts.down.format(1)

    def symptom(result: Tensor) -> None:
        assert {place[:2] for place in lost_places(model, into, batch, inputs=True)} == {(0, 0), (0, 1), (0, 2)}

    return Planted(
        model=model, run=batch, symptom=symptom,
        expected=half_overflow(
            str(parts.product).format(1), "mul", row=0, rows=(0,), position=0, positions=(0, 1, 2), token=0,
            value=102400.0, never=("starts with",), says=("row 0",),
        ),
    )  # fmt: skip


def beams(name: str) -> Planted:
    """Every beam holds the prompt, so all of them break."""
    model, path = decoder(name), DECODERS[name].parts.down.format(0)
    answer(model, path, forward, {AT: 80000.0})
    model.half()

    def run(m: Any) -> Tensor:
        out = m.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, num_beams=2, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return torch.stack(out.logits)

    return Planted(
        model=model, run=run,
        expected=half_overflow(site(path), row=0, position=AT, positions=(AT,), token=int(IDS[0, AT])),
    )  # fmt: skip


class EightBits(DynamicCache):
    """Keys and values kept as integers of 8 bits with a scale, or in a format of 8 bits."""

    def __init__(self, dtype: torch.dtype, **how: Any) -> None:
        super().__init__(**how)
        self.stored = dtype

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self._through(keys), self._through(values)

    def _through(self, x: Tensor) -> Tensor:
        if self.stored is not torch.int8:
            return x.to(self.stored).to(x.dtype)
        scale = x.abs().amax(-1, keepdim=True).float() / 127
        return ((x.float() / scale.clamp(min=1e-6)).round().to(torch.int8).float() * scale).to(x.dtype)


def quantised(name: str) -> Planted:
    """A fault in the second step, with a cache of 8-bit integers."""
    model, path = decoder(name), DECODERS[name].parts.down.format(1)
    tokens = torch.tensor([[77]])

    def run(m: Any) -> Tensor:
        cache = EightBits(torch.int8, config=m.config)
        m(IDS, past_key_values=cache)
        return m(tokens, past_key_values=cache).logits

    answer(model, path, run, {LAST + 1: 80000.0})
    model.half()
    return Planted(
        model=model, run=run,
        expected=half_overflow(site(path), step=1, row=0, position=LAST + 1, token=77),
    )  # fmt: skip


def narrow_cache(name: str) -> Planted:
    """A value that float16 holds and the cache's float8 does not."""
    model, parts = decoder(name), DECODERS[name].parts
    path = str(parts.values).format(1)
    answer(model, path, forward, {AT: 64000.0})
    model.half()

    def run(m: Any) -> Tensor:
        return m(IDS, past_key_values=EightBits(torch.float8_e5m2, config=m.config)).logits

    return Planted(
        model=model, run=run,
        symptom=lambda result: no_loss(lost_places(model, path, run)),
        expected=Expected(
            sites=(f"{site(parts.attention.format(1))}/cast.*",), operators=("cast",), kinds=("overflow",), row=0,
            position=AT, step=0, value=64000.0, outcome="reached", says=("e5m2",), label=NOT_PROBABILITIES,
        ),
    )  # fmt: skip


def no_loss(places: list[tuple[int, ...]]) -> None:
    assert not places


class Compressed(DynamicCache):
    """Puts a key of its own into the cache, as methods that leave keys out do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if keys.shape[-2] == LAST + 2 and layer_idx == 1:
            fake = torch.zeros(keys.shape[-1])
            fake[2] = -2e5
            keys = keys.clone()
            keys[:, 0, 3] = fake  # rounded as it is written
            self.layers[1].keys = keys
        return keys, values


def compressed(name: str) -> Planted:
    model, parts = decoder(name), DECODERS[name].parts
    model.half()

    def run(m: Any) -> Tensor:
        cache = Compressed(config=m.config)
        m(IDS, past_key_values=cache)
        return m(torch.tensor([[20]]), past_key_values=cache).logits

    return Planted(
        model=model, run=run,
        expected=Expected(
            sites=(f"{site(parts.attention.format(1))}/*cast.*", f"{site(parts.attention.format(1))}/copy.*"),
            operators=("cast", "copy"), kinds=("overflow",), step=1, value=-2e5, label=NOT_PROBABILITIES,
        ),
    )  # fmt: skip


def cropped(name: str) -> Planted:
    """Tokens that were rejected are cut off the cache, and others come in their place."""
    model, path = decoder(name), DECODERS[name].parts.down.format(1)
    first, second = torch.tensor([[1, 10, 11, 12, 13]]), torch.tensor([[20, 21]])

    def run(m: Any) -> Tensor:
        cache = DynamicCache(config=m.config)
        m(first, past_key_values=cache)
        cache.crop(-3)
        return m(second, past_key_values=cache).logits

    answer(model, path, run, {6: 80000.0})
    model.half()
    return Planted(
        model=model, run=run,
        expected=half_overflow(site(path), step=1, row=0, position=3, positions=(3,), token=21),
    )  # fmt: skip


def windowed(name: str) -> Planted:
    """A mask for a sliding window that hides every key from the first queries."""
    model, length, window = decoder(name).half(), 8, 4
    ids = torch.arange(10, 10 + length)[None]
    causal = torch.full((length, length), -math.inf, dtype=torch.float16).triu(1)[None, None]
    sliding = causal.clone()
    sliding[..., : length - window] = -math.inf

    def run(m: Any) -> Tensor:
        return m(ids, attention_mask={"full_attention": causal, "sliding_attention": sliding}).logits

    return Planted(
        model=model, run=run,
        expected=Expected(
            sites=("layers.0.self_attn/softmax.0",), operators=("softmax",), kinds=("masked-row",), row=0, position=0,
            positions=(0, 1, 2, 3), step=0, outcome="reached", says=("mask",), no_rounding=True,
            never=("starts with", "wider range", "overflows in"),
        ),
    )  # fmt: skip


def row(name: str, root: int, family: str, plant: Callable[..., Planted], *args: Any, **how: Any) -> Row:
    return Row(name=name, root=root, family=family, make=lambda: plant(*args, **how))


ROWS: tuple[Row, ...] = (
    *(row("second row of a batch", 6, f, in_batch, f, 1, 2) for f in ("gemma", "llama", "phi", "gpt2", "qwen3")),
    *(row("padded row of a batch", 6, f, in_batch, f, 0, 4) for f in ("gemma3", "mistral", "qwen2")),
    *(row("padding overflows", 6, f, padding, f) for f in ("llama", "mistral", "qwen3")),
    *(row("beams", 6, f, beams, f) for f in ("llama", "gemma2", "phi")),
    *(row("cache that is cropped", 6, f, cropped, f) for f in ("llama", "qwen2", "gpt2", "gemma")),
    *(row("static cache", 6, f, generated, f, "static") for f in ("llama", "gemma3", "gemma4", "gemma3n", "qwen3")),
    *(row("cache of 8-bit integers", 6, f, quantised, f) for f in ("llama", "gemma2", "mistral")),
    *(row("cache of float8", 8, f, narrow_cache, f) for f in ("llama", "qwen2", "phi", "gemma")),
    *(row("key written into the cache", 8, f, compressed, f) for f in ("llama", "qwen3", "mistral", "gemma3")),
    *(row("longer than the window", 2, f, windowed, f) for f in ("gemma2", "gemma3")),
)  # fmt: skip
