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

GELU_DIP = 0.1701
"""gelu in its tanh form is at least −0.17004, and as far from max(x, 0) at most: |gelu(x) − max(x, 0)| <= 0.1701."""


def channels(ball: Ball) -> Tensor:
    """|y_i| <= r |g_i|, reached by the vector that has only channel i. [E]"""
    return ball.gain * ball.radius


def linear(rows: Tensor, ball: Ball) -> Tensor:
    """|row · y| <= r ||row ∘ g||, by Cauchy and Schwarz, reached by n along row ∘ g. [R]"""
    lengths: Tensor = torch.linalg.vector_norm(rows * ball.gain, dim=-1)
    return ball.radius * lengths


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


def mixed_heads(output: Tensor, value: Tensor, ball: Ball, weights: float) -> Tensor:
    """|Σ_h row_h · (Σ_k p_hk V_h y_k)| <= weights · r Σ_h ||row_h V_h ∘ g||: an output projection over attention. [E]

    `output` [E, N, D] is o_proj by heads, `value` [G, D, E] v_proj. Σ_k p_hk (row_h V_h y_k) is a mixture of numbers
    that are each a row of a ball. Every head may attend to another token, so the heads' bounds are added.
    """
    groups = output.shape[1] // value.shape[0]
    total = torch.zeros(output.shape[0], dtype=torch.float64)
    for head in range(output.shape[1]):
        total += linear(output[:, head] @ value[head // groups], ball)
    return weights * total


def normed_scores(query: Ball, key: Ball) -> Tensor:
    """|q · k| <= r_q r_k max_p (G_p H_p), of balls of pairs' lengths after RoPE (`Arithmetic.rotated`).

    |q · k| <= Σ_p ||q_p|| ||k_p|| <= Σ_p G_p H_p a_p b_p with ||a|| <= r_q, ||b|| <= r_k. The sum is at most the
    largest factor times Σ a_p b_p <= ||a|| ||b||.
    """
    return query.radius * key.radius * (query.gain * key.gain).max()


def bare_scores(query: Tensor, key: Tensor, ball: Ball, growth: float, error: float, tiny: float) -> Tensor:
    """|q · k| <= Σ_p ||q_p|| ||k_p|| <= ||T q|| ||T^-1 k|| for any scale t_p > 0 of each pair of channels p.

    `query`, `key` [D, E] are one head's rows, both read from `ball`, at any two tokens. ||T q|| <= r σmax(T Q G), and
    RoPE keeps pairs' lengths, however far apart the tokens are. T begins with equal Frobenius norms of q_p and k_p
    and follows the largest singular vectors; every T is valid and the least bound is returned.
    As computed, each q_i is off by `error` · r ||row_i ∘ g|| and by a subnormal, each pair grows by `growth` and a few
    `tiny`; errors of all channels together are at most the matrix's Frobenius norm times `error`.
    """
    q, k = query * ball.gain, key * ball.gain
    squared = torch.ones(len(q) // 2, dtype=torch.float64)
    best = torch.tensor(math.inf, dtype=torch.float64)
    q_pairs, k_pairs = _pairs(q.square().sum(-1)), _pairs(k.square().sum(-1))
    for _ in range(4):
        squared = squared * ((k_pairs + 1e-30) / (q_pairs + 1e-30)).sqrt()  # ||q_p|| t_p = ||k_p|| / t_p
        sides = []
        for rows, t in ((q, squared.sqrt()), (k, squared.rsqrt())):
            scaled = rows * t.repeat(2)[:, None]
            values, vectors = torch.linalg.eigh(scaled @ scaled.T)
            length = ball.radius * (values[-1].clamp(min=0).sqrt() + error * torch.linalg.matrix_norm(scaled))
            length = growth * (length + tiny * math.sqrt(2) * torch.linalg.vector_norm(t))
            sides.append((length + 4 * tiny * torch.linalg.vector_norm(t), _pairs(vectors[:, -1].square())))
        (q_length, q_pairs), (k_length, k_pairs) = sides
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
