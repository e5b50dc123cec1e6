"""Make a Gemma larger or smaller inside without changing what it computes.

RMSNorm ignores the scale of its input, up to eps. Multiply everything that any RMSNorm reads by one γ, and
every eps by γ², and the logits stay; when γ is a power of two they stay bit for bit, because nothing is rounded
elsewhere than before. γ > 1 brings a format's overflow nearer on demand, γ < 1 takes it away.

    generation   weights × γ                          gain 1 + w         final gain   eps
    1            embed_tokens, o_proj, down_proj      -                  ÷ γ          × γ²
    2            the same                             post-norms × γ     ÷ γ          × γ²
    3            the same, and q_proj, k_proj         post-norms × γ     ÷ γ          × γ²

The final gain makes up for the head, which is tied to the scaled embedding. q·kᵀ, its soft-cap, v, gate · up and
the logits keep their size.

Bit for bit holds while no float32 value leaves the normal range. Within 2^-24 ≤ γ ≤ 2^24 that takes a residual
above 2^39 (its square overflows) or a weight below 2^-102; the mean square plus eps, at least 1e-6 · γ² = 2^-68,
stays normal. In float16 and bfloat16 weights may become subnormal, as they would in an exported checkpoint.
"""

import math

import torch

from stabilitykit.checkpoints.config import GemmaConfig
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.model import Gemma, RMSNorm

LARGEST_EXPONENT = 24


def apply_rescale(model: Gemma, gamma: float) -> None:
    """Scale a float32 (or float64) model by `gamma`, a power of two, in place; twice multiplies.

    Scaled parameters are replaced, never written to: they may be memory-mapped. Raises MisuseError for any other
    γ, for a 16-bit model, whose weights are already rounded, and for a streamed one, whose weights are not there:
    `build(..., rescale=gamma)` scales before it casts, and as it reads.
    """
    check_gamma(gamma)
    check_gamma(model.rescale * gamma)
    if torch.finfo(model.dtype).bits < 32:
        raise MisuseError(
            f"A rescale is applied to the float32 weights, before they are cast; this model is already {model.dtype}. "
            "Pass rescale= to build or load."
        )
    if model.streamed:
        raise MisuseError(
            "A rescale is applied to weights that are in memory; this model's are read when they are needed. Pass "
            "rescale= to build or load."
        )
    for name, weight in model.named_parameters():
        if weight_factor(model.config, name, gamma) != 1.0:
            weight.data = weight.data * gamma
    rescale_norms(model, gamma)


def check_gamma(gamma: float) -> None:
    """Raise MisuseError unless γ is a power of two from 2^-24 to 2^24."""
    significand, exponent = math.frexp(gamma)
    if significand != 0.5 or abs(exponent - 1) > LARGEST_EXPONENT:
        raise MisuseError(
            f"A rescale γ is a power of two from 2^-{LARGEST_EXPONENT} to 2^{LARGEST_EXPONENT}, so that scaling by "
            f"it rounds nothing; {gamma} is not. Try 0.125, 4 or 16384."
        )


def weight_factor(config: GemmaConfig, name: str, gamma: float) -> float:
    """What the parameter `name` (`layers.3.mlp.down_proj.weight`) is multiplied by: γ or 1."""
    scaled = {"embed_tokens", "o_proj", "down_proj"}
    if config.query_key_norm:  # the norms of q and k read these
        scaled |= {"q_proj", "k_proj"}
    return gamma if name.removesuffix(".weight").rpartition(".")[2] in scaled else 1.0


def rescale_norms(model: Gemma, gamma: float) -> None:
    """The norms' half of the rescale: gains by `RMSNorm.scale`, which is exact for any `w`, and every eps."""
    for name, norm in model.named_modules():
        if isinstance(norm, RMSNorm):
            norm.eps *= gamma**2
            if name == "norm":
                norm.scale /= gamma
            elif model.config.post_norms and name.endswith(("post_attention_layernorm", "post_feedforward_layernorm")):
                norm.scale *= gamma
    model.rescale *= gamma
