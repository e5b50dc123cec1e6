"""What a vector in a ball can become: one inequality a function, each with its derivation.

Everything is float64, in exact arithmetic; `stabilitykit.bounds.arithmetic` adds what rounding does. A ball is what an
RMSNorm puts out: y = g ∘ n with ||n||_2 <= r, and r = sqrt(d), because n = x / sqrt(mean(x²) + eps) has
||n||² = d · mean(x²) / (mean(x²) + eps) <= d. `rows` [R, E] are those of a matrix that reads y, without the gain.
NaN in gives NaN out.
"""

import math

import torch
from torch import Tensor

from stabilitykit.bounds.arithmetic import Ball

DIPS = {"gelu": 0.1701, "silu": 0.2785}
"""gelu, exact or in its tanh form, is at least −0.17004 and silu −0.27847, and both are so far from max(x, 0) at most;
where x > 0 neither is above x."""


def channels(ball: Ball) -> Tensor:
    """|y_i| <= r |g_i|, reached by the vector that has only channel i. [E]"""
    return ball.gain * ball.radius


def linear(rows: Tensor, ball: Ball) -> Tensor:
    """|row · y| <= r ||row ∘ g||, by Cauchy and Schwarz, reached by n along row ∘ g. [R]"""
    lengths: Tensor = torch.linalg.vector_norm(rows * ball.gain, dim=-1)
    return ball.radius * lengths


def boxed(rows: Tensor, largest: Tensor) -> Tensor:
    """|row · y| <= Σ |row_i| Y_i where each |y_i| <= Y_i: for what no norm has bounded. [R]"""
    return rows.abs() @ largest


def with_biases(ball: Ball, *parts: tuple[Tensor, Tensor]) -> tuple[Ball, tuple[Tensor, ...]]:
    """Rows with biases as rows alone: row · y + b = (row, b / κ) · (y, κ), and (y, κ) is in a ball of a channel more.

    The radius is sqrt(r² + κ²), for any κ > 0. What is lost is least where row ∘ g and b / κ are to each other as κ to
    r, so κ² = r ||b|| / ||rows ∘ g|| of all rows together.
    """
    lengths = [
        sum(float(one.square().sum()) for one in kind) ** 0.5 for kind in zip(*_scaled(ball, parts), strict=True)
    ]
    kappa = math.sqrt(ball.radius * max(lengths[1], 1e-30) / max(lengths[0], 1e-30))
    widened = Ball(torch.cat((ball.gain, torch.ones(1, dtype=torch.float64))), math.hypot(ball.radius, kappa))
    return widened, tuple(torch.cat((rows, bias[:, None] / kappa), 1) for rows, bias in parts)


def _scaled(ball: Ball, parts: tuple[tuple[Tensor, Tensor], ...]) -> list[tuple[Tensor, Tensor]]:
    return [(rows * ball.gain, bias) for rows, bias in parts]


def length_of_pair(first: Tensor, second: Tensor, ball: Ball) -> Tensor:
    """||(first · y, second · y)|| <= r σ, σ the largest singular value of the two rows ∘ g. [R]

    σ² is the larger root for the Gram matrix [[a, c], [c, b]]: (a + b) / 2 + sqrt((a − b)² / 4 + c²). A rotation of
    the pair keeps its length, so neither of the two can become larger.
    """
    first, second = first * ball.gain, second * ball.gain
    a, b, c = (first * first).sum(-1), (second * second).sum(-1), (first * second).sum(-1)
    return ball.radius * ((a + b) / 2 + torch.hypot((a - b) / 2, c)).sqrt()


def mixture(values: Tensor, weights: float) -> Tensor:
    """|Σ p_k v_k| <= Σ p_k · max|v_k|: attention over any number of tokens, of probabilities that sum to `weights`."""
    return weights * values


def mixed_heads(output: Tensor, value: Tensor, bias: Tensor, ball: Ball, weights: float) -> Tensor:
    """|Σ_h row_h · (Σ_k p_hk (V_h y_k + b_h))| <= weights · Σ_h (r ||row_h V_h ∘ g|| + |row_h · b_h|). [E]

    An output projection over attention: `output` [E, N, D] is o_proj by heads, `value` [G, D, E] v_proj, `bias` [G, D].
    Σ_k p_hk (row_h V_h y_k) is a mixture of numbers that are each a row of a ball. Every head may attend to another
    token, so the heads' bounds are added.
    """
    groups = output.shape[1] // value.shape[0]
    total = torch.zeros(output.shape[0], dtype=torch.float64)
    for head in range(output.shape[1]):
        rows, group = output[:, head], head // groups
        total += linear(rows @ value[group], ball) + (rows @ bias[group]).abs()
    return weights * total


def normed_scores(query: Ball, key: Ball) -> Tensor:
    """|q · k| <= r_q r_k max_p (G_p H_p), of balls of pairs' lengths after RoPE (`Arithmetic.rotated`).

    |q · k| <= Σ_p ||q_p|| ||k_p|| <= Σ_p G_p H_p a_p b_p with ||a|| <= r_q, ||b|| <= r_k. The sum is at most the
    largest factor times Σ a_p b_p <= ||a|| ||b||.
    """
    return query.radius * key.radius * (query.gain * key.gain).max()


def bare_scores(
    query: Tensor, key: Tensor, ball: Ball, growth: tuple[float, float], error: float, tiny: float
) -> Tensor:
    """|q · k| <= Σ_p ||q_p|| ||k_p|| <= ||T q|| ||T^-1 k|| for any scale t_p > 0 of each pair of channels p.

    `query`, `key` [D, E + 1] are one head's rows with a bias b behind them, both read from `ball`, at any two tokens.
    ||T q|| <= r σmax(T Q G) + ||T b||, and RoPE keeps pairs' lengths, however far apart the tokens are. T begins with
    equal lengths of q_p and k_p and follows the largest singular vectors; every T is valid and the least bound is
    returned. As computed, each q_i is off by `error` of r ||row_i ∘ g|| + |b_i| and by `tiny`, and each pair grows by
    the factor and the length in `growth`; errors of all channels together are at most the matrix's Frobenius norm times
    `error`.
    """
    sides = [(rows[:, :-1] * ball.gain, rows[:, -1]) for rows in (query, key)]
    squared = torch.ones(len(query) // 2, dtype=torch.float64)
    best = torch.tensor(math.inf, dtype=torch.float64)
    q_pairs, k_pairs = (_pairs(rows.square().sum(-1) + (bias / ball.radius).square()) for rows, bias in sides)
    for _ in range(4):
        squared = squared * ((k_pairs + 1e-30) / (q_pairs + 1e-30)).sqrt()  # ||q_p|| t_p = ||k_p|| / t_p
        found = []
        for (rows, bias), t in zip(sides, (squared.sqrt(), squared.rsqrt()), strict=True):
            scaled, aside = rows * t.repeat(2)[:, None], bias * t.repeat(2)
            values, vectors = torch.linalg.eigh(scaled @ scaled.T)
            length = ball.radius * (values[-1].clamp(min=0).sqrt() + error * torch.linalg.matrix_norm(scaled))
            length = length + (1 + error) * torch.linalg.vector_norm(aside)
            length = growth[0] * (length + tiny * math.sqrt(2) * torch.linalg.vector_norm(t))
            pairs = _pairs(vectors[:, -1].square() * values[-1].clamp(min=0) + (aside / ball.radius).square())
            found.append((length + growth[1] * torch.linalg.vector_norm(t), pairs))
        (q_length, q_pairs), (k_length, k_pairs) = found
        best = torch.minimum(best, q_length * k_length)
    return best


def _pairs(squares: Tensor) -> Tensor:
    first, second = squares.chunk(2)
    return first + second


def gated(gate: Tensor, up: Tensor, ball: Ball) -> Tensor:
    """|a·n| |b·n| <= r² (||a|| ||b|| + |a · b|) / 2, of rows a of gate, b of up, gains included; one vector n. [R]

    (a·n)(b·n) = n^T (a b^T + b a^T) n / 2, whose eigenvalues are (a·b ± ||a|| ||b||) / 2; reached halfway between a
    and ±b. For x > 0 gelu(x) <= x; for x < 0 it is at most GELU_DIP in magnitude, which the caller takes care of.
    """
    a, b = gate * ball.gain, up * ball.gain
    lengths: Tensor = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return ball.radius**2 * (lengths + (a * b).sum(-1).abs()) / 2


def soft_capped(bound: Tensor, cap: float) -> Tensor:
    """|cap · tanh(x / cap)| <= cap · tanh(bound / cap) for |x| <= bound: tanh is odd and grows."""
    return cap * torch.tanh(bound / cap)


def added(residual: Tensor, sublayer: Tensor) -> Tensor:
    """|h_i + a_i| <= |h_i| + |a_i|, channel by channel: the residual stream. [E]"""
    return residual + sublayer
