"""Faults in decoders that are wrapped, adapted, sampled from and trained."""

import math
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from truth.decoders import AT, IDS, LAST, after, forward, here, linear, site
from truth.decoding import half_overflow, row
from truth.models import DECODERS, decoder
from truth.plants import answer
from truth.row import Expected, Origin, Planted, Row

SAMPLER_BLAMED = ("top_p = None", "temperature None", "top_k = None")


def adapted(merge: bool, name: str = "llama") -> Planted:
    """An adapter whose update is past the maximum: merged it is a weight, on top it is the adapter's own output."""
    model = decoder(name)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["up_proj"], init_lora_weights=True)
    wrapped: Any = peft.get_peft_model(model, config)
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


class Broken(LogitsProcessor):
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
            sites=("layers.0.input_layernorm*", "/*"), kinds=("weight",), coarse=("weight", "input"), position=1,
            unsure=("position",), outcome="reached",
            origin=Origin(kinds=("weight",), names=("soft_prompt",), finite=False), says=("soft_prompt",),
            never=("finite operands", "overflows in"),
        ),
    )  # fmt: skip


def assisted(name: str) -> Planted:
    """The assistant that drafts tokens overflows; it is no part of the model that is recorded."""
    model, assistant = decoder(name).half(), decoder(name, num_hidden_layers=1)
    answer(assistant, DECODERS[name].parts.down.format(0), forward, {LAST: 80000.0})
    assistant.half()

    def run(m: Any) -> Tensor:
        out = m.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, assistant_model=assistant,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return torch.cat(out.logits)

    def symptom(result: Tensor) -> None:
        assert bool(result.isfinite().all())
        assert not bool(forward(assistant).isfinite().all())

    return Planted(
        model=model, run=run, symptom=symptom,
        expected=Expected(
            sites=("outside*",), operators=("matmul",), kinds=("overflow",), value=80000.0, says=("outside",),
            never=SAMPLER_BLAMED,
        ),
    )  # fmt: skip


def looked_up(name: str) -> Planted:
    """Drafts are taken from the prompt, and the cache is cropped where they are rejected; the prompt itself breaks."""
    model, path = decoder(name), DECODERS[name].parts.down.format(0)
    ids = torch.tensor([[10, 11, 12, 13, 10, 11]])

    def prompt(m: Any) -> Tensor:
        return m(ids).logits

    def run(m: Any) -> Tensor:
        out = m.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, prompt_lookup_num_tokens=2,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return torch.cat(out.logits)

    answer(model, path, prompt, {2: 80000.0})
    model.half()
    return Planted(
        model=model, run=run,
        expected=half_overflow(site(path), row=0, position=2, token=12),  # a draft may repeat the token further on
    )  # fmt: skip


ROWS: tuple[Row, ...] = (
    *(row("drafts of an assistant", 7, f, assisted, f) for f in ("llama", "qwen2")),
    *(row("drafts from the prompt", 6, f, looked_up, f) for f in ("llama", "gemma", "qwen3")),
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
    row("logits, soft-capped", 3, "gemma2", linear, "gemma2", "lm_head"),
)  # fmt: skip
