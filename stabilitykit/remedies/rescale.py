"""One power of two on everything that a norm reads: the same function, farther from float16's end.

RMSNorm ignores the scale of its input, up to eps. `stabilitykit.models.gemma.rescale` holds the recipe and says why
float32 logits keep every bit; here it is applied to a checkpoint's stored numbers, gains included, so that plain
transformers runs the result. With γ < 1 the residual stream shrinks by it; the final norm's output grows by 1 / γ, and
more embedding entries become subnormal in float16.

Between `up_proj` and `down_proj` of each layer another power of two β may stand: up_proj × β and down_proj ÷ β leave
what the layer returns, and gate · up, which no norm has tamed, shrinks by β.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.config import GemmaConfig
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.rescale import check_gamma, weight_factor
from stabilitykit.remedies.remedy import Remedy

# Of transformers' families that look alike, why the recipe would change what they compute.
REFUSED: Mapping[str, str] = {
    "gemma3n": "Gemma 3n gates its per-layer inputs on the raw residual stream, whose scale then matters",
    "gemma4": "Gemma 4 gates per-layer inputs on the raw residual stream, and its norms multiply by w where those of "
    "earlier generations multiply by 1 + w",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaled:
    """A checkpoint after rescaling. `rounded` counts, by norm, gains that are not γ times what they were in float32.

    `inner` are β by layer, none where all are 1.
    """

    checkpoint: Checkpoint
    gamma: float
    rounded: Mapping[str, int]
    inner: tuple[float, ...] = ()


def rescale(checkpoint: Checkpoint, gamma: float, inner: Sequence[float] = ()) -> Rescaled:
    """`checkpoint` with everything that a norm reads scaled by `gamma`, and eps by γ²; `inner` are β by layer.

    Tensors are scaled when they are asked for, in float32. A gain 1 + w that is to become γ(1 + w) is stored as
    γ(1 + w) − 1, which float32 may have to round; 1 + w itself is computed as the model does. Raises MisuseError for a
    γ or β that is no power of two from 2^-24 to 2^24.
    """
    for factor in (gamma, *inner):
        check_gamma(factor)
    config = replace(checkpoint.config, rms_eps=checkpoint.config.rms_eps * gamma**2)
    tensors = _Scaled(checkpoint.tensors, checkpoint.config, gamma, inner)
    rounded = {name: lost for name in tensors if (lost := _rounded(checkpoint, tensors, name, gamma))}
    note = f"rescaled by 2^{round(math.log2(gamma))}"
    if any(beta != 1 for beta in inner):
        note += f", gate · up by 2^{round(math.log2(min(inner)))} to 2^{round(math.log2(max(inner)))}"
    made = replace(checkpoint, config=config, tensors=tensors, notes=(*checkpoint.notes, note))
    return Rescaled(checkpoint=made, gamma=gamma, rounded=rounded, inner=tuple(inner))


def matrix_factor(config: GemmaConfig, name: str, gamma: float, inner: Sequence[float] = ()) -> float:
    """What the parameter `name`, if it is no norm's, is multiplied by."""
    factor = weight_factor(config, name, gamma)
    layer, _, projection = name.removeprefix("layers.").removesuffix(".weight").partition(".mlp.")
    if inner and projection == "up_proj":
        return factor * inner[int(layer)]
    if inner and projection == "down_proj":
        return factor / inner[int(layer)]
    return factor


def gain_factor(config: GemmaConfig, name: str, gamma: float) -> float:
    """What the gain 1 + w of the norm with the parameter `name` is multiplied by."""
    norm = name.removesuffix(".weight")
    if norm == "norm":
        return 1 / gamma
    is_post = norm.endswith(("post_attention_layernorm", "post_feedforward_layernorm"))
    return gamma if config.post_norms and is_post else 1.0


def refuse_folder(folder: Path) -> None:
    """Raises MisuseError for a Hugging Face folder of a family whose function a rescale would change; says why."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # no such folder: whoever opens the checkpoint says what is wrong with it
    model_type = str(raw.get("model_type")) if isinstance(raw, dict) else ""
    for family, reason in REFUSED.items():
        if model_type.startswith(family):
            raise MisuseError(
                f"A rescaled model computes what it did before; {model_type} would not: {reason}. Run it in bfloat16."
            )


class _Scaled(Mapping[str, Tensor]):
    def __init__(
        self, tensors: Mapping[str, Tensor], config: GemmaConfig, gamma: float, inner: Sequence[float]
    ) -> None:
        self._tensors = tensors
        self._config = config
        self._gamma = gamma
        self._inner = inner

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        matrix = matrix_factor(self._config, name, self._gamma, self._inner)
        gain = gain_factor(self._config, name, self._gamma)
        if matrix != 1.0:
            return tensor.float() * matrix
        if gain != 1.0:
            return (1.0 + tensor.float()) * gain - 1.0
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


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
        summary += " So that no prompt can break it, gate · up is smaller by a power of two of each layer's own."
    return Remedy(
        name=f"rescale 2^{exponent}{' proved' if inner else ''}",
        summary=summary,
        change=lambda checkpoint: rescale(checkpoint, gamma, inner).checkpoint,
    )


def choose_gamma(headroom: float, final_norm: float, margin: float) -> float:
    """The largest γ ≤ 1 that leaves `margin` bits of headroom, from that of the largest value that γ scales.

    A smaller one would be worse on both other counts: each halving takes a bit from the final norm's output, and makes
    more weights subnormal in float16. `final_norm` is the headroom of that output. Raises MisuseError where no γ leaves
    both of them the margin.
    """
    bits = max(0, math.ceil(margin - headroom))
    if final_norm - bits < margin:
        raise MisuseError(
            f"A rescale leaves every tensor its margin; with {headroom:.1f} bits of headroom in the residual stream "
            f"and {final_norm:.1f} in the final norm, which grows as the other shrinks, no power of two leaves both "
            f"{margin:g}. Ask for a smaller --margin."
        )
    return 2.0**-bits


def stored_gains(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, int]:
    """How many gains of each norm are rounded where the checkpoint is stored in `dtype`, of norms that have any."""
    found = {}
    for name in checkpoint.tensors:
        if name.endswith("norm.weight"):  # no other is read: a rescaled one is computed when it is asked for
            tensor = checkpoint.tensors[name]
            lost = int((tensor.float() != tensor.to(dtype).float()).sum())
            if lost:
                found[name] = lost
    return found
