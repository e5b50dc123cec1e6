"""Small decoders of other families, and what the modules of transformers make of states chosen against them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from families import SMALL
from torch import Tensor, nn

from stabilitykit.recorder import record

_GEMMA_4: dict[str, Any] = {
    "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 4, "global_head_dim": 32, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8,
}  # fmt: skip
_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}

# class of config, and what differs from its defaults and from SMALL
DECODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"num_hidden_layers": 2}),
    "llama, biases": (transformers.LlamaConfig, {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}),
    "llama, tied, rope scaled": (
        transformers.LlamaConfig,
        {"num_hidden_layers": 2, "tie_word_embeddings": True, "hidden_act": "gelu",
         "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "mistral": (transformers.MistralConfig, {"num_hidden_layers": 2, "sliding_window": 4}),
    "qwen2": (transformers.Qwen2Config, {"num_hidden_layers": 2}),
    "qwen3": (transformers.Qwen3Config, {"num_hidden_layers": 2}),
    "gemma4": (transformers.Gemma4TextConfig, {**_GEMMA_4, "final_logit_softcapping": 30.0}),
    "gemma4, shared": (
        transformers.Gemma4TextConfig,
        {**_GEMMA_4, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
         "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    ),
    "gemma4, experts": (
        transformers.Gemma4TextConfig,
        {**_GEMMA_4, **_EXPERTS, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
         "num_global_key_value_heads": 1},
    ),
}  # fmt: skip


def written(name: str, folder: Path, *, spread: float = 0.3, bias: float = 2.0, scalar: float = 0.7) -> Path:
    """Normal weights and biases, gains around one but for one of twenty in each norm; saved in float32."""
    kind, changes = DECODERS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SMALL | changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn * spread)
            elif parameter_name.endswith("bias"):
                parameter.copy_(drawn * bias)
            else:
                parameter.copy_(1 + drawn / 2)
                parameter[3] = 20.0
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("layer_scalar"):
                buffer.fill_(scalar)
    model.save_pretrained(folder)
    return folder


def with_tokenizer(folder: Path) -> Path:
    """`folder` with a tokenizer of its own: one of the 512 ids for each word, whichever it is."""
    names = {"<pad>": 0, "<bos>": 1, "a": 2} | {f"t{index}": index for index in range(3, 512)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", unk_token="a"
    ).save_pretrained(folder)
    return folder


def opened(folder: Path, dtype: str) -> Any:
    """transformers' model of the folder, eager, with weights as stored in `dtype`, and computing in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def largest_of_prompts(model: Any) -> dict[str, float]:
    generator = torch.Generator().manual_seed(6)
    return recorded(model, [lambda: model(torch.randint(0, 512, (24, 12), generator=generator))])


def recorded(module: nn.Module, calls: list[Callable[[], object]]) -> dict[str, float]:
    """The largest magnitude at each site; infinite where there is an infinity."""
    found: dict[str, float] = {}
    with torch.inference_mode(), record(module, formats=(), matmul="float32-accumulate") as recording:
        for call in calls:
            call()
    for one in recording:
        amax = float("inf") if one.positive_inf or one.negative_inf else one.amax or 0.0
        found[one.site] = max(found.get(one.site, 0.0), amax)
    return found


class Sublayers(nn.Module):
    """What follows one layer's norms, alone, under its path in the model."""

    def __init__(self, model: Any, index: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): model.model.layers[index]})
        self.rotary_emb = model.model.rotary_emb
        kinds = getattr(model.config, "layer_types", None)
        self.kind = (kinds[index],) if str(model.config.model_type).startswith("gemma4") and kinds else ()
        self.pre = "pre_feedforward_layernorm" if self.kind else "post_attention_layernorm"
        self.shared: dict[str, Any] = {}

    @property
    def layer(self) -> Any:
        return next(iter(self.layers.values()))

    def attention(self, state: Tensor, positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """`state` [B, T, E] enters the input norm; its tokens stand at these T positions."""
        tables = self.rotary_emb(state, torch.tensor([positions]), *self.kind)
        blocked = torch.full((len(positions),) * 2, torch.finfo(state.dtype).min, dtype=state.dtype).triu(1)
        shared = {"shared_kv_states": self.shared} if self.kind else {}
        out: tuple[Tensor, Tensor] = self.layer.self_attn(
            hidden_states=self.layer.input_layernorm(state),
            position_embeddings=tables,
            attention_mask=blocked[None, None],
            **shared,
        )
        return out

    def mlp(self, state: Tensor) -> Tensor:
        out: Tensor = self.layer.mlp(getattr(self.layer, self.pre)(state))
        return out


class Head(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm, self.lm_head = model.model.norm, model.lm_head

    def forward(self, state: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.norm(state))
        return logits


def unit(states: Tensor) -> Tensor:
    return states / states.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)


def random_states(count: int = 600) -> Tensor:
    """[count, E]: dense, with one or two large channels, large and small."""
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(count, SMALL["hidden_size"], generator=generator)
    states = states * torch.randn(states.shape, generator=generator).mul(2).exp()
    return states * torch.randn(count, 1, generator=generator).exp()


def ascended(make: Callable[[Tensor], Tensor], tokens: int = 1, steps: int = 60) -> Tensor:
    """States [n, tokens, E] from which each channel of `make` was driven up and down by steps along its gradient."""
    generator = torch.Generator().manual_seed(7)
    width = make(torch.ones(1, tokens, SMALL["hidden_size"])).numel()
    channels = torch.arange(width)[:: max(1, width // 32)].repeat(4)
    sign = torch.where(torch.arange(len(channels)) % 2 == 0, 1.0, -1.0)
    state = unit(torch.randn(len(channels), tokens, SMALL["hidden_size"], generator=generator))
    for _ in range(steps):
        state.requires_grad_(True)
        made = make(state).flatten(1)
        goal = (made[torch.arange(len(channels)), channels] * sign).sum()
        (slope,) = torch.autograd.grad(goal, state)
        state = unit(state.detach() + 0.5 * unit(slope))
    return state.detach()


@dataclass(frozen=True)
class Chosen:
    """States [n, 1, E] that enter a layer's attention alone, pairs of them [n, 2, E], and what enters its MLP."""

    index: int
    alone: Tensor
    pairs: Tensor
    mlp: Tensor


def chosen_states(model: Any) -> list[Chosen]:
    """For each layer of a float32 model, states from which its tensors were driven up and down."""
    return [_chosen(Sublayers(model, index), index) for index in range(len(model.model.layers))]


def _chosen(parts: Sublayers, index: int) -> Chosen:
    layer, own = parts.layer, hasattr(parts.layer.self_attn, "k_proj")
    attention, norm, pre = layer.self_attn, layer.input_layernorm, getattr(layer, parts.pre)
    projections = [one for name in "qkv" if (one := getattr(attention, f"{name}_proj", None)) is not None]
    alone = [ascended(behind(norm, one)) for one in projections]
    if own:
        alone.append(ascended(lambda state: parts.attention(state, (0,))[0]))
    gated = layer.mlp, layer.mlp.gate_proj, layer.mlp.up_proj, partial(_gated, layer.mlp)
    mlp = [ascended(behind(pre, one)) for one in gated]
    single = unit(torch.eye(SMALL["hidden_size"]))[:, None]
    pairs = ascended(lambda state: _scores(parts, state), 2) if own else torch.zeros(0, 2, SMALL["hidden_size"])
    return Chosen(index, torch.cat([*alone, single]), pairs, torch.cat([*mlp, single]))


def behind(norm: nn.Module, module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda state: module(norm(state))


def _gated(mlp: Any, x: Tensor) -> Tensor:
    gated: Tensor = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return gated


def _scores(parts: Sublayers, state: Tensor) -> Tensor:
    """q of the second token times k of the first, before RoPE, by heads."""
    held: list[Tensor] = []
    attention = parts.layer.self_attn
    names = ("q_norm", "k_norm") if hasattr(attention, "q_norm") else ("q_proj", "k_proj")
    hooks = [
        getattr(attention, one).register_forward_hook(lambda module, given, out: held.append(out)) for one in names
    ]
    parts.attention(state, (0, 1))
    for hook in hooks:
        hook.remove()
    query, key = (one.view(len(state), 2, -1, attention.head_dim) for one in held)
    return (query[:, 1] * key[:, 0].repeat_interleave(query.shape[2] // key.shape[2], 1)).sum(-1)


def largest_of_states(model: Any, states: Sequence[Chosen]) -> dict[str, float]:
    """At every site of the layers' attention and MLP and of the head: what chosen and random states lead to."""
    found: dict[str, float] = {}
    drawn, dtype = random_states().to(model.dtype), model.dtype
    shared: dict[str, Any] = {}
    for chosen in states:
        parts = Sublayers(model, chosen.index)
        parts.shared = shared  # keys and values that later layers look at
        alone, pairs, mlp = (one.to(dtype) for one in (chosen.alone, chosen.pairs, chosen.mlp))
        calls: list[Callable[[], object]] = [partial(parts.mlp, mlp), partial(parts.mlp, drawn[:, None])]
        calls.append(partial(parts.attention, drawn.view(-1, 2, drawn.shape[1]), (0, 1)))
        if len(pairs):
            calls += [partial(parts.attention, pairs, (0, distance)) for distance in (1, 7)]
            calls.append(partial(parts.attention, torch.cat([alone, drawn[:, None]]), (0,)))
            calls.append(calls[2])  # last, for the layers that look at what it leaves behind
        for site, value in recorded(parts, calls).items():
            found[site] = max(found.get(site, 0.0), value)
    toward = unit(model.lm_head.weight.float() * model.model.norm.weight.float())
    return found | recorded(Head(model), [partial(Head(model), torch.cat([toward.to(dtype), drawn])[:, None])])
