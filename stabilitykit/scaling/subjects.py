"""How the models that the kit opens are run for a trace, and built again from a changed config."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stabilitykit.checkpoints import GemmaConfig
from stabilitykit.models.gemma import Gemma, KVCache
from stabilitykit.scaling.blueprint import Blueprint
from stabilitykit.scaling.trace import Run


def blueprint_of(model: Any) -> Blueprint | None:
    """Of the kit's own Gemma, whose settings are the fields of GemmaConfig; of a model of transformers, whose settings
    are its config's dictionary; and of one of diffusers. None of any other: then nothing is known of its settings.
    """
    if isinstance(model, Gemma):
        rounding = model.rounding
        return Blueprint(
            settings=asdict(model.config), build=lambda settings: Gemma(GemmaConfig(**settings), rounding=rounding)
        )
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):

        def build(settings: Mapping[str, Any]) -> nn.Module:
            changed = type(config).from_dict(deepcopy(dict(settings)))
            changed._attn_implementation = getattr(config, "_attn_implementation", None)
            made: nn.Module = type(model)(changed)
            return made

        return Blueprint(settings=config.to_dict(), build=build)
    if hasattr(type(model), "from_config") and isinstance(config, Mapping):
        return Blueprint(settings=dict(config), build=lambda settings: type(model).from_config(dict(settings)))
    return None


def continued(inputs: Mapping[str, Tensor], steps: int = 2) -> Run:
    """One forward pass on `inputs`, the arguments of a call by their names, then, where the model keeps a cache of what
    it has read, so many steps of one token each. Returned are the logits, or whatever else holds numbers.

    The inputs are `fitted` to the model.
    """

    def run(model: nn.Module) -> list[Tensor]:
        given = fitted(inputs, model)
        return (
            _of_gemma(model, given["input_ids"], steps) if isinstance(model, Gemma) else _of_other(model, given, steps)
        )

    return run


def fitted(inputs: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Inputs on the device of the model's weights, floating ones in their dtype."""
    weight = next(one for one in model.parameters() if one.is_floating_point())
    return {
        name: one.to(weight.device, weight.dtype if one.is_floating_point() else one.dtype)
        for name, one in inputs.items()
    }


def _of_gemma(model: Gemma, ids: Tensor, steps: int) -> list[Tensor]:
    cache = KVCache(model.config, batch=len(ids), length=ids.shape[1] + steps, dtype=model.dtype, device=model.device)
    logits = [model(ids, cache=cache)]
    for _ in range(steps):
        logits.append(model(ids[:, -1:], cache=cache))
    return logits


def _of_other(model: Any, inputs: Mapping[str, Tensor], steps: int) -> list[Tensor]:
    generates = getattr(model, "can_generate", None)
    tokens = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    goes_on = steps > 0 and generates is not None and generates() and tokens in inputs
    output = model(**inputs, **({"use_cache": True} if goes_on else {}))
    found = _numbers(output)
    for step in range(steps if goes_on else 0):
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            break
        output = model(**_next(inputs, output, tokens, step, cache))
        found += _numbers(output)
    return found


def _next(inputs: Mapping[str, Tensor], output: Any, tokens: str, step: int, cache: Any) -> dict[str, Any]:
    """What one more token is given: that one, the cache, and a mask that is one longer."""
    last = inputs[tokens][:, -1:]
    given: dict[str, Any] = {tokens: last, "past_key_values": cache, "use_cache": True}
    if tokens == "decoder_input_ids":
        encoded = getattr(output, "encoder_last_hidden_state", None)
        given |= {"encoder_outputs": (encoded,)}
    mask = inputs.get("attention_mask")
    if mask is not None:
        more = torch.ones(len(mask), step + 1, dtype=mask.dtype, device=mask.device)
        given["attention_mask"] = mask if tokens == "decoder_input_ids" else torch.cat((mask, more), dim=1)
    return given


def _numbers(output: Any) -> list[Tensor]:
    """The logits of an output; of one that has none everything that is returned, but for caches."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return [logits]
    held = (
        {k: v for k, v in output.items() if "past" not in k and "cache" not in k}
        if hasattr(output, "items")
        else output
    )
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
