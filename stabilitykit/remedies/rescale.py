"""Scales everything that a norm reads by a power of two γ: the same function, with more headroom in float16.

RMSNorm ignores the scale of its input, up to eps: multiply everything that any norm reads by γ and every eps by γ², and
the logits stay. It is applied to a checkpoint's weights, gains included, so that plain transformers runs the result.
With γ < 1 the residual stream shrinks by γ, the final norm's output grows by 1 / γ, and more embedding entries become
subnormal in float16.

Each layer may have another power of two β between its `up_proj` and `down_proj`: up_proj × β and down_proj ÷ β leave
the layer's output unchanged, and gate · up, which no norm limits, shrinks by β.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.checkpoint import LazyTensors
from stabilitykit.checkpoints.config import GemmaConfig
from stabilitykit.errors import MisuseError
from stabilitykit.remedies.remedy import Remedy
from stabilitykit.scaling.stress import check_gamma

# Families of transformers that look alike, and why the recipe would change what they compute.
REFUSED: Mapping[str, str] = {
    "gemma3n": "Gemma 3n gates its per-layer inputs on the raw residual stream, whose scale then matters",
    "gemma4": "Gemma 4 gates per-layer inputs on the raw residual stream, and its norms multiply by w where those of "
    "earlier generations multiply by 1 + w",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaled:
    """A checkpoint after rescaling. `rounded` counts, by norm, the gains that float32 had to round.

    `inner` are β by layer, empty where all are 1.
    """

    checkpoint: Checkpoint
    gamma: float
    rounded: Mapping[str, int]
    inner: tuple[float, ...] = ()


def rescale(checkpoint: Checkpoint, gamma: float, inner: Sequence[float] = ()) -> Rescaled:
    """`checkpoint` with everything that a norm reads scaled by `gamma`, and eps by γ²; `inner` are β by layer.

    Tensors are scaled when they are requested, in float32. A gain 1 + w that becomes γ(1 + w) is stored as
    γ(1 + w) − 1, which float32 may have to round; 1 + w itself is computed as in the model. Raises MisuseError for a
    γ or β that is not a power of two from 2^-24 to 2^24.
    """
    for factor in (gamma, *inner):
        check_gamma(factor)
    config = replace(checkpoint.config, rms_eps=checkpoint.config.rms_eps * gamma**2)
    tensors = LazyTensors(checkpoint.tensors, lambda name: _scaled(checkpoint, name, gamma, inner))
    rounded = {name: lost for name in tensors if (lost := _rounded(checkpoint, tensors, name, gamma))}
    note = f"rescaled by 2^{round(math.log2(gamma))}"
    if any(beta != 1 for beta in inner):
        note += f", gate · up by 2^{round(math.log2(min(inner)))} to 2^{round(math.log2(max(inner)))}"
    made = replace(checkpoint, config=config, tensors=tensors, notes=(*checkpoint.notes, note))
    return Rescaled(checkpoint=made, gamma=gamma, rounded=rounded, inner=tuple(inner))


def matrix_factor(config: GemmaConfig, name: str, gamma: float, inner: Sequence[float] = ()) -> float:
    """The factor of the parameter `name`, unless it is a norm's."""
    factor = _weight_factor(config, name, gamma)
    layer, _, projection = name.removeprefix("layers.").removesuffix(".weight").partition(".mlp.")
    if inner and projection == "up_proj":
        return factor * inner[int(layer)]
    if inner and projection == "down_proj":
        return factor / inner[int(layer)]
    return factor


def gain_factor(config: GemmaConfig, name: str, gamma: float) -> float:
    """The factor of the gain 1 + w of the norm whose parameter is `name`."""
    norm = name.removesuffix(".weight")
    if norm == "norm":
        return 1 / gamma
    is_post = norm.endswith(("post_attention_layernorm", "post_feedforward_layernorm"))
    return gamma if config.post_norms and is_post else 1.0


def refuse_folder(folder: Path) -> None:
    """Raises MisuseError, with the reason, for a Hugging Face folder of a family that a rescale would change."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # no such folder: opening the checkpoint says what is wrong with it
    model_type = str(raw.get("model_type")) if isinstance(raw, dict) else ""
    for family, reason in REFUSED.items():
        if model_type.startswith(family):
            raise MisuseError(f"A rescale would change what {model_type} computes: {reason}. Run it in bfloat16.")


def _scaled(checkpoint: Checkpoint, name: str, gamma: float, inner: Sequence[float]) -> Tensor:
    tensor = checkpoint.tensors[name]
    matrix = matrix_factor(checkpoint.config, name, gamma, inner)
    gain = gain_factor(checkpoint.config, name, gamma)
    if matrix != 1.0:
        return tensor.float() * matrix
    if gain != 1.0:
        return (1.0 + tensor.float()) * gain - 1.0
    return tensor


def _rounded(before: Checkpoint, after: Mapping[str, Tensor], name: str, gamma: float) -> int:
    factor = gain_factor(before.config, name, gamma)
    if factor == 1.0:
        return 0
    return int(((1.0 + after[name]) != (1.0 + before.tensors[name].float()) * factor).sum())


def rescaling(gamma: float, inner: Sequence[float] = ()) -> Remedy:
    """`rescale` as a remedy."""
    exponent = round(math.log2(gamma))
    summary = (
        f"Scales everything that a norm reads by 2^{exponent} and eps by 2^{2 * exponent}: the same function, to the "
        "last bit in float32."
    )
    if inner:
        summary += (
            " So that no prompt can make it overflow, each layer's gate · up is scaled down by its own power of two."
        )
    return Remedy(
        name=f"rescale 2^{exponent}{' proved' if inner else ''}",
        summary=summary,
        change=lambda checkpoint: rescale(checkpoint, gamma, inner).checkpoint,
    )


def choose_gamma(headroom: float, final_norm: float, margin: float) -> float:
    """The largest power of two γ ≤ 1 that leaves `margin` bits of headroom; `headroom` is that of what γ scales [bits].

    A smaller γ only costs: each halving takes a bit of headroom from the final norm's output, `final_norm` [bits], and
    makes more weights subnormal in float16. Raises MisuseError where no γ leaves both of them the margin.
    """
    bits = max(0, math.ceil(margin - headroom))
    if final_norm - bits < margin:
        raise MisuseError(
            f"No power-of-two rescale leaves {margin:g} bits of headroom everywhere: the residual stream has "
            f"{headroom:.1f} bits, and the final norm, which grows as the residual stream shrinks, {final_norm:.1f}. "
            "Try a smaller --margin."
        )
    return 2.0**-bits


def stored_gains(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, int]:
    """How many gains of each norm are rounded by storing the checkpoint in `dtype`; norms without any are left out."""
    found = {}
    for name in checkpoint.tensors:
        if name.endswith("norm.weight"):  # no other is read: a rescaled tensor is computed on request
            tensor = checkpoint.tensors[name]
            lost = int((tensor.float() != tensor.to(dtype).float()).sum())
            if lost:
                found[name] = lost
    return found


def _weight_factor(config: GemmaConfig, name: str, gamma: float) -> float:
    """What the parameter `name` (`layers.3.mlp.down_proj.weight`) is multiplied by: γ or 1."""
    scaled = {"embed_tokens", "o_proj", "down_proj"}
    if config.query_key_norm:  # the norms of q and k read these
        scaled |= {"q_proj", "k_proj"}
    return gamma if name.removesuffix(".weight").rpartition(".")[2] in scaled else 1.0
