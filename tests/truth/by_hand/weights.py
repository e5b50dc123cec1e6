"""Powers of two in weights and settings, after which a model computes the same; and weights that are no numbers."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from truth.by_hand import Change
from truth.models import DECODERS
from truth.row import Planted

POWERS = (1, 2, 4, 8)
_QUERIES, _KEYS, _VALUES = ("q_proj", "q", "query"), ("k_proj", "k", "key"), ("v_proj", "v", "value")
_OUTPUTS = ("o_proj", "out_proj", "dense", "o")
_SETTINGS = ("scaling", "scale")
_EPS = ("eps", "variance_epsilon", "epsilon")


def times(linear: Any, factor: float, bias: bool = True) -> None:
    """What a linear layer returns times a factor; without its bias where only what it is given has changed."""
    linear.weight.data *= factor
    if bias and getattr(linear, "bias", None) is not None:
        linear.bias.data *= factor


def child(module: nn.Module, names: tuple[str, ...]) -> Any:
    """The module under one of these names, if it is a projection, or a norm with a gain."""
    found = (getattr(module, name, None) for name in names)
    return next((one for one in found if isinstance(one, nn.Module) and hasattr(one, "weight")), None)


def up_and_down(k: int) -> Change:
    """gate · up times 2^-k, for `down` is linear in it."""

    def change(planted: Planted, stack: ExitStack) -> Any:
        found = 0
        for module in planted.model.modules():
            up, down = child(module, ("up_proj", "wi_1")), child(module, ("down_proj", "wo"))
            if up is not None and down is not None and child(module, ("gate_proj", "wi_0")) is not None:
                for part in _adapted(up):
                    times(part, 2.0**-k)
                times(getattr(down, "base_layer", down), 2.0**k, bias=False)
                found += 1
            elif isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                experts: Any = module
                half = experts.gate_up_proj.shape[1] // 2
                experts.gate_up_proj.data[:, half:] *= 2.0**-k
                experts.down_proj.data *= 2.0**k
                found += 1
        return planted.model if found else None

    return change


def _adapted(linear: Any) -> Iterator[Any]:
    """A layer, or that under an adapter and what the adapter adds to it."""
    yield getattr(linear, "base_layer", linear)
    yield from (linear.lora_B.values() if hasattr(linear, "lora_B") else ())


def value_and_output(k: int) -> Change:
    def change(planted: Planted, stack: ExitStack) -> Any:
        found = 0
        for path, module in planted.model.named_modules():
            fused: Any = getattr(module, "c_attn", None)
            value, output = child(module, _VALUES), child(module, _OUTPUTS)
            if value is not None and output is None and path.endswith(".self"):  # BERT's output is beside it
                output = planted.model.get_submodule(path.removesuffix("self") + "output").dense
            if value is not None and output is not None:
                times(value, 2.0**-k)
                times(output, 2.0**k, bias=False)
                found += 1
            elif isinstance(fused, Conv1D):
                third = fused.weight.shape[1] // 3
                fused.weight.data[:, 2 * third :] *= 2.0**-k
                fused.bias.data[2 * third :] *= 2.0**-k
                times(module.c_proj, 2.0**k, bias=False)
                found += 1
        return planted.model if found else None

    return change


def query_and_key(less: str, more: str, k: int) -> Change:
    """`less` (query or key) times 2^-k, `more` (the other, or scaling) times 2^k."""

    def change(planted: Planted, stack: ExitStack) -> Any:
        found = 0
        for module in planted.model.modules():
            parts = {"query": child(module, _QUERIES), "key": child(module, _KEYS)}
            if parts["query"] is None or parts["key"] is None or _normed(module):
                continue
            setting = next((name for name in _SETTINGS if isinstance(getattr(module, name, None), float)), None)
            if more == "scaling":
                if setting is None:
                    continue
                setattr(module, setting, getattr(module, setting) * 2.0**k)
            else:
                times(parts[more], 2.0**k)
            times(parts[less], 2.0**-k)
            found += 1
        return planted.model if found else None

    return change


def _normed(attention: nn.Module) -> bool:
    """Whether queries or keys pass a norm, which undoes a factor."""
    return child(attention, ("q_norm", "k_norm")) is not None


def scale_on_queries(planted: Planted, stack: ExitStack) -> Any:
    """The power of two in the scores' scale, on the queries' layer instead."""
    found = 0
    for module in planted.model.modules():
        query = child(module, _QUERIES)
        setting = next((name for name in _SETTINGS if isinstance(getattr(module, name, None), float)), None)
        if query is None or setting is None or _normed(module):
            continue
        power = math.floor(math.log2(getattr(module, setting)))
        if power >= 0:
            continue
        times(query, 2.0**power)
        setattr(module, setting, getattr(module, setting) * 2.0**-power)
        found += 1
    return planted.model if found else None


def larger_eps(size: float) -> Change:
    def change(planted: Planted, stack: ExitStack) -> Any:
        found = 0
        for module in planted.model.modules():
            for name in _EPS:
                if isinstance(getattr(module, name, None), float) and getattr(module, name) < size:
                    setattr(module, name, size)
                    found += 1
        return planted.model if found else None

    return change


def weight_replaced(planted: Planted, stack: ExitStack) -> Any:
    """0 in the place of each element of a weight or buffer that is no finite number."""
    found = 0
    for one in (*planted.model.parameters(), *planted.model.buffers()):
        if one.is_floating_point() and not bool(one.isfinite().all()):
            one.data.nan_to_num_(0.0, 0.0, 0.0)
            found += 1
    return planted.model if found else None


def rescale(gamma: float) -> Change:
    """Everything that norms read times γ, and their eps times γ², for a stream that norms alone read."""

    def change(planted: Planted, stack: ExitStack) -> Any:
        model = planted.model
        family = getattr(getattr(model, "config", None), "model_type", "").removesuffix("_text").replace("_", "")
        if family not in _STREAMS:
            return None
        for path, module in model.named_modules():
            own = [name for name in _EPS if isinstance(getattr(module, name, None), float)]
            last = path.rpartition(".")[2]
            if last in ("q_norm", "k_norm"):
                continue
            if own and (family not in _POST or last in _PRE):
                for name in own:
                    setattr(module, name, getattr(module, name) * gamma**2)
            if family in _POST and last in ("post_attention_layernorm", "post_feedforward_layernorm"):
                module.weight.data = _gained(module.weight.data, gamma)
            if isinstance(module, nn.Embedding):
                module.weight.data *= gamma
            elif family not in _POST and last in ("o_proj", "dense", "c_proj", "down_proj", "fc2"):
                for part in _adapted(module):
                    if not hasattr(part, "weight"):  # code of somebody's own around the layer
                        return None
                    times(part, gamma)
            elif isinstance(getattr(module, "down_proj", None), nn.Parameter):
                module.down_proj.data *= gamma
        return model

    return change


_STREAMS = ("gemma", "gemma2", "gemma3", "llama", "mistral", "qwen2", "qwen3", "phi", "gpt2", "mixtral", "qwen3moe")
_POST = ("gemma2", "gemma3")
_PRE = ("input_layernorm", "pre_feedforward_layernorm", "norm")
assert set(_STREAMS) <= set(DECODERS)


def _gained(weight: Tensor, gamma: float) -> Tensor:
    """Of a gain that is 1 + w."""
    return ((1 + weight.double()) * gamma - 1).to(weight.dtype)


def merged(planted: Planted, stack: ExitStack) -> Any:
    """An adapter merged into its weights in float32, and rounded after that."""
    model: Any = planted.model
    if not hasattr(model, "merge_and_unload"):
        return None
    dtype = next(model.parameters()).dtype
    return model.float().merge_and_unload().to(dtype)


def routing_weights_in_experts(planted: Planted, stack: ExitStack) -> Any:
    """Each expert's hidden vector times its routing weight, instead of its output."""
    found = [one for one in planted.model.modules() if isinstance(getattr(one, "gate_up_proj", None), nn.Parameter)]

    def forward(experts: Any) -> Any:
        def compute(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            rows = []
            for x, own, by in zip(hidden, chosen, weights, strict=True):
                outputs = []
                for expert, weight in zip(own.tolist(), by, strict=True):
                    gate, up = nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
                    inner = experts.act_fn(gate) * up * weight.to(x.dtype)
                    outputs.append(nn.functional.linear(inner, experts.down_proj[expert]))
                rows.append(torch.stack(outputs).sum(0))
            return torch.stack(rows)

        return compute

    for experts in found:
        experts.forward = forward(experts)
    return planted.model if found else None
