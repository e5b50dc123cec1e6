"""Faults in decoders as they are used: caches, batches, beams, adapters, processors, wrappers and training."""

import math
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from truth.decoders import AT, DECODERS, IDS, LAST, after, forward, generated, here, linear, site
from truth.models import decoder
from truth.plants import answer, lost_places
from truth.row import Expected, Origin, Planted, Row

LEFT = torch.tensor([[0, 0, 0, 11, 12, 13], [21, 22, 23, 24, 25, 26]])
LEFT_MASK = (LEFT != 0).long()
NOT_PROBABILITIES = "^(?!.*probabilities)"
SAMPLER_BLAMED = ("top_p = None", "temperature None", "top_k = None")


def batch(m: Any) -> Tensor:
    positions = (LEFT_MASK.cumsum(-1) - 1).clamp(min=0)
    return m(LEFT, attention_mask=LEFT_MASK, position_ids=positions).logits


def half_overflow(path: str, operator: str = "matmul", **rest: Any) -> Expected:
    return Expected(
        sites=(path,), operators=(operator,), kinds=("overflow",),
        **{"channel": 0, "value": 80000.0, "step": 0, "outcome": "reached", "residual": operator == "matmul"} | rest,
    )  # fmt: skip


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


class EightBits(DynamicCache):  # type: ignore[misc]
    """Keys and values kept as integers of 8 bits with a scale, or in a format of 8 bits."""

    def __init__(self, dtype: torch.dtype, **how: Any) -> None:
        super().__init__(**how)
        self.stored = dtype

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **how: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(keys, values, layer, *args, **how)
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


class Compressed(DynamicCache):  # type: ignore[misc]
    """Puts a key of its own into the cache, as methods that leave keys out do."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **how: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(keys, values, layer, *args, **how)
        if keys.shape[-2] == LAST + 2 and layer == 1:
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


def adapted(merge: bool, name: str = "llama") -> Planted:
    """An adapter whose update is past the maximum: merged it is a weight, on top it is the adapter's own output."""
    model = decoder(name)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["up_proj"], init_lora_weights=True)
    wrapped = peft.get_peft_model(model, config)
    target = wrapped.base_model.model.model.layers[0].mlp.up_proj
    for weight in (target.lora_A["default"].weight, target.lora_B["default"].weight):
        weight.data.zero_()
    target.lora_A["default"].weight.data[0, 9] = 300.0
    target.lora_B["default"].weight.data[7, 0] = 70000.0 / 300.0
    if not merge:  # the same size, at one position
        down = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default"
        answer(wrapped, down, lambda m: m(input_ids=IDS), {AT: 300.0})
    whole = (wrapped.merge_and_unload() if merge else wrapped).half().eval().requires_grad_(False)
    path = "layers.0.mlp.up_proj"

    def run(m: Any) -> Tensor:
        return m(input_ids=IDS).logits

    if merge:
        expected = Expected(
            sites=(path,), operators=("matmul",), kinds=("weight",), step=0, outcome="reached",
            origin=Origin(kinds=("weight",), names=(f"{path}.weight",), finite=False), says=("up_proj",),
            never=(r"(?<!if not, )no number format helps", "overflows in"),
        )  # fmt: skip
        return Planted(model=whole, run=run, expected=expected)
    return Planted(
        model=whole, run=run,
        expected=Expected(
            sites=(f"{path}.lora_B.default",), operators=("matmul",), kinds=("overflow",), channel=7, step=0,
            value=70000.0, outcome="reached", says=("lora_B",), **here(),
        ),
    )  # fmt: skip


def of_generate(name: str, *says: str, dtype: torch.dtype = torch.float32, sample: bool = True, **how: Any) -> Planted:
    """What transformers' own processors do to finite logits."""
    model = decoder(name).to(dtype)

    def run(m: Any) -> Tensor:
        torch.manual_seed(0)
        out = m.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=sample,
            return_dict_in_generate=True, output_logits=True, **how,
        )  # fmt: skip
        return out.logits[0]

    def symptom(result: Tensor) -> None:
        assert bool(forward(model).isfinite().all())

    return Planted(
        model=model, run=run, symptom=symptom, raises=sample,
        expected=Expected(
            sites=("outside*",) if sample else (), kinds=("masked-row", "invalid", "overflow", "constant"), says=says,
            never=SAMPLER_BLAMED,
        ),
    )  # fmt: skip


class Broken(LogitsProcessor):  # type: ignore[misc]
    """A processor of the user's own that takes the logarithm of a negative number."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.log(scores - 1000)


ALL = list(range(DECODERS["llama"].sizes["vocab_size"]))


class Sanitised(nn.Module):
    """Puts numbers in the place of what is not finite, so that the logits look healthy."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(nn.functional.linear(x, self.weight), nan=0.0, posinf=6e4, neginf=-6e4)


def sanitised(name: str) -> Planted:
    model, path = decoder(name), DECODERS[name].parts.down.format(1)
    answer(model, path, forward, {AT: 80000.0})
    model.lm_head = Sanitised(model.lm_head)
    model.half()
    return Planted(
        model=model, run=forward, symptom=after(model, path, AT),
        expected=half_overflow(
            site(path), outcome="absorbed", absorbed_by=("nan_to_num",), harmless=False, says=("nan_to_num",), **here(),
        ),
    )  # fmt: skip


class HalfRotary(nn.Module):
    """Rotary angles in float16, which ends at 65,504."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.register_buffer("inv_freq", old.inv_freq.half(), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].half() * self.inv_freq
        both = torch.cat((angles, angles), -1)
        return both.cos(), both.sin()


def rotary(name: str) -> Planted:
    model = decoder(name).half()
    model.model.rotary_emb = HalfRotary(model.model.rotary_emb)

    def run(m: Any) -> Tensor:
        return m(IDS, position_ids=torch.arange(70000, 70006)[None]).logits

    return Planted(
        model=model, run=run,
        expected=Expected(
            sites=("rotary_emb/constant_cast.0",), operators=("cast",), kinds=("overflow",), step=0, value=70000.0,
            outcome="reached", never=("starts with", "token 10"),
        ),
    )  # fmt: skip


def frequencies(name: str) -> Planted:
    """An infinity in the buffer of the rotary embedding."""
    model = decoder(name).half()
    model.model.rotary_emb.inv_freq[2] = math.inf
    return Planted(
        model=model, run=forward,
        expected=Expected(
            sites=("rotary_emb/*", "rotary_emb*"), kinds=("weight",), step=0, outcome="reached",
            origin=Origin(kinds=("buffer",), names=("*rotary_emb.inv_freq",), finite=False), says=("inv_freq",),
            never=("starts with", "overflows in"),
        ),
    )  # fmt: skip


class Wrapped(nn.Module):
    """A model in another one, under a name of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.language_model = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.language_model(input_ids).logits


def wrapped(name: str) -> Planted:
    inner = decoder(name)
    answer(inner, "lm_head", forward, {LAST: 80000.0})
    model = Wrapped(inner).half()
    return Planted(
        model=model, run=lambda m: m(IDS),
        expected=half_overflow(
            "language_model.lm_head", row=0, position=LAST, positions=(LAST,), token=int(IDS[0, LAST]), label="logits",
            says=("logit",),
        ),
    )  # fmt: skip


def trained(name: str) -> Planted:
    """A loss scale that float16's gradients do not hold."""
    model = decoder(name).half().requires_grad_()

    def run(m: Any) -> Tensor:
        m.zero_grad()
        loss = m(IDS, labels=IDS).loss
        (loss * 2.0**24).backward()
        return loss.detach().reshape(1)

    def symptom(result: Tensor) -> None:
        assert bool(result.isfinite().all())
        assert any(not bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)

    return Planted(
        model=model, run=run, symptom=symptom, grad=True,
        expected=Expected(
            sites=("backward/*",), kinds=("unresolved",), says=("backward|gradient",),
            never=("temperature", "greedy", "finite throughout"), wider=True,
        ),
    )  # fmt: skip


def soft_prompt(name: str) -> Planted:
    """A parameter that one step of training in float16 made NaN."""
    model = decoder(name).half()
    lost = torch.zeros(1, 2, 64, dtype=torch.float16)
    lost[0, 1, 3] = math.nan
    model.soft_prompt = nn.Parameter(lost, requires_grad=False)

    def run(m: Any) -> Tensor:
        vectors = m.get_input_embeddings()(IDS)
        return m(inputs_embeds=torch.cat((m.soft_prompt, vectors), 1)).logits

    return Planted(
        model=model, run=run,
        expected=Expected(
            sites=("layers.0.input_layernorm*", "/*"), kinds=("weight",), position=1, unsure=("position",), outcome="reached",
            origin=Origin(kinds=("weight",), names=("soft_prompt",), finite=False), says=("soft_prompt",),
            never=("finite operands", "overflows in"),
        ),
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
    row("merged adapter", 4, "llama", adapted, True),
    row("merged adapter", 4, "mistral", adapted, True, "mistral"),
    row("adapter on top", 5, "llama", adapted, False),
    row("adapter on top", 5, "qwen2", adapted, False, "qwen2"),
    row("every token suppressed", 7, "llama", of_generate, "llama", "SuppressTokens", suppress_tokens=ALL),
    row("every token suppressed, greedy", 7, "llama", of_generate, "llama", "SuppressTokens|no token", sample=False,
        suppress_tokens=ALL),
    row("every token suppressed, min-p", 7, "qwen2", of_generate, "qwen2", "SuppressTokens", suppress_tokens=ALL,
        min_p=0.1),
    row("every token suppressed, eta", 7, "gpt2", of_generate, "gpt2", "SuppressTokens", suppress_tokens=ALL,
        eta_cutoff=3e-4),
    row("a tiny temperature", 7, "mistral", of_generate, "mistral", "Temperature", temperature=1e-40),
    row("a processor of the user's own", 7, "phi", of_generate, "phi", "Broken",
        logits_processor=LogitsProcessorList([Broken()])),
    *(row("logits that are sanitised", 3, f, sanitised, f) for f in ("llama", "qwen2", "mistral")),
    *(row("rotary angles in half", 4, f, rotary, f) for f in ("llama", "qwen2", "mistral")),
    *(row("infinite frequency", 1, f, frequencies, f) for f in ("llama", "qwen3", "phi")),
    *(row("logits under a prefix", 10, f, wrapped, f) for f in ("llama", "qwen2")),
    *(row("gradients", 7, f, trained, f) for f in ("llama", "gemma", "gpt2")),
    *(row("soft prompt", 1, f, soft_prompt, f) for f in ("llama", "qwen2")),
    *(row("longer than the window", 2, f, windowed, f) for f in ("gemma2", "gemma3")),
    row("logits, soft-capped", 3, "gemma2", linear, "gemma2", "lm_head"),
)  # fmt: skip
