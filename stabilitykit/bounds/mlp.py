"""Bounds of a gated MLP: gate · up, and the sum over all of their products in `down_proj`."""

from collections.abc import Generator

import torch
from torch import Tensor

import stabilitykit.bounds.inequalities as inequalities
from stabilitykit.bounds.arithmetic import WIDE, outward, sum_error
from stabilitykit.bounds.gated_sum import GatedSum, largest_first
from stabilitykit.bounds.weights import Bound, LayerMatrices, Weights, sums

_REFINED = 48
"""Refinements of rows of `down_proj` in a layer; most layers of the 270M need four to twenty."""


def mlp(weights: Weights, name: str, norm: str, layer: LayerMatrices) -> Generator[Bound, None, Tensor]:
    """Sites of the MLP; returns the bounds of `down_proj`'s channels [E]."""
    arithmetic = weights.arithmetic
    yield from weights.normed(f"{name}.{norm}", layer.gains[norm])
    ball = weights.ball(layer.gains[norm])
    gate_F, up_F = weights.projected(layer, "gate_proj", ball), weights.projected(layer, "up_proj", ball)
    yield f"{name}.mlp.gate_proj", gate_F
    yield f"{name}.mlp{weights.recipe.sites.activated}", torch.maximum(arithmetic.stored(gate_F, 8), weights.dip)
    yield f"{name}.mlp.up_proj", up_F

    gate, up = layer["gate_proj"], layer["up_proj"]
    terms, roundings = sums(gate, layer.biases.get("gate_proj"))
    if roundings > 1:
        ball, (gate, up) = inequalities.with_biases(
            ball, (gate, layer.biases["gate_proj"]), (up, layer.biases["up_proj"])
        )
    # x and y of x · y are each off by `off` of their largest, and by subnormals; the gate is rounded once more
    off, tiny = arithmetic.product_error(terms, roundings), arithmetic.subnormals(roundings)
    sizes = inequalities.linear(gate, ball), inequalities.linear(up, ball)
    product_F = inequalities.gated(gate, up, ball) + (2 * off + off**2) * sizes[0] * sizes[1]
    product_F = product_F + tiny * (1 + off) * (sizes[0] + sizes[1]) + tiny**2
    product_F = product_F * (1 + arithmetic.unit) * (1 + WIDE) ** 8 + arithmetic.tiny * up_F
    yield f"{name}.mlp/mul.0", arithmetic.stored(torch.maximum(product_F, weights.dip * up_F), 1)

    layer.down = GatedSum(gate * ball.gain, up * ball.gain, layer["down_proj"], sum_error(terms))
    square = largest_first(layer.down.cheap(), layer.down.refine, layer.down.is_done, _REFINED)
    long_gate, long_up = (_length(rows * ball.gain, ball.radius, off, tiny) for rows in (gate, up))
    out_E = _down(weights, square * ball.radius**2, layer, long_gate, long_up, roundings)
    yield f"{name}.mlp.down_proj", out_E
    return out_E


def _length(rows: Tensor, radius: float, off: float, tiny: float) -> Tensor:
    """Of all a projection's channels together, as stored."""
    small = rows.T @ rows if rows.shape[1] <= rows.shape[0] else rows @ rows.T
    spectral = torch.linalg.eigvalsh(small)[-1].clamp(min=0).sqrt()
    length: Tensor = outward(radius * (spectral + off * torch.linalg.matrix_norm(rows))) + tiny * len(rows) ** 0.5
    return length


def _down(weights: Weights, positive: Tensor, layer: LayerMatrices, gate: Tensor, up: Tensor, roundings: int) -> Tensor:
    """Bounds of `down_proj`'s channels as stored [E], from those of its sum over max(x, 0) · y by row and sign.

    The activation is max(x, 0) plus at most `dip`, so Σ |W_j| dip |y_j| <= dip ||W_i||_2 ||y||_2 is added, where
    `gate` and `up` are the lengths of x and y. Four roundings of relative size u stand on each term: of x, y, the
    activation, the product; two more where x and y have a bias. Subnormals add η |x_j|, η |y_j| or η. The sum of
    |terms| that γ applies to is at most the bound from above and that from below together.
    """
    arithmetic, down, bias = weights.arithmetic, layer["down_proj"], layer.biases.get("down_proj")
    weight, tiny = torch.linalg.vector_norm(down, dim=1), arithmetic.tiny
    rounded = (1 + arithmetic.unit) ** (2 + 2 * roundings) * (1 + WIDE) ** 9
    beside = weights.dip * up * weight + arithmetic.subnormals(roundings) * weight * (gate + up)
    beside = beside + tiny * weight * (up + len(down.T) ** 0.5)
    above, below = ((part + beside) * rounded for part in positive.chunk(2))
    added = sum_error(down.shape[1]) * (above + below)
    out_E = arithmetic.stored(torch.maximum(above, below) + added)
    return out_E if bias is None else weights.summed(out_E, down.shape[1], bias)
