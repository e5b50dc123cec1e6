"""The largest eigenvalue behind `down_proj`: Σ_j W_j max(a_j · n, 0) (b_j · n) over the ball.

For every s > 0, with σ the sign of W,

    W max(x, 0) y = (W x y + W |x| y) / 2 <= |W| (σ x y + |x y|) / 2 <= |W| (s x + σ y / s)² / 4,

because 2|x y| <= s² x² + y² / s². So the sum is at most n^T M n <= ||n||² λmax(M) with the positive semidefinite

    M = Σ_j |W_j| c_j c_j^T,   c_j = (s_j a_j + σ_j b_j / s_j) / 2,

and its least value is bounded by the same with −W. Any s_j will do. There is one M for each row of `down_proj` and
sign, and a site needs the largest of their bounds alone: all rows get a cheap bound, the largest are made exact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.bounds.arithmetic import sum_error

_COMMON = 48
"""Shared directions, whose part of each M is diagonalised instead of bounded by its Frobenius norm."""

_BLOCK = 1 << 24
"""Elements of a Gram matrix at a time: 64 MiB."""

STEPS = 3
"""Improvements of s after which a row is done: three lower the bound by a seventh on the 270M, forty by a fifth."""

_LOSS = 1e-11
"""More than float64 loses in a matrix M of up to 10^5 terms, as a fraction of its trace."""


@dataclass
class Exact:
    """What is known of one row and sign: log s [F], and λmax with its eigenvectors [E, few], largest last."""

    log_s: Tensor
    vectors: Tensor
    steps: int = 0


class GatedSum:
    """Bounds of λmax(M) by row and sign: index i < R is row i from above, i + R is row i from below.

    `gate`, `up` [F, E] with the gains in them, `down` [R, F], float64. `error` is that of a · n as computed, relative
    to ||a|| ||n||: with v_j = sqrt(|W_j|) c_j · n and e_j what is added to it, ||v + e|| <= ||v|| + ||e||, and ||e||²
    is at most error² ||n||² Σ_j |W_j| (s ||a_j|| + ||b_j|| / s)² / 4. So a bound is (sqrt(λmax) + error · sqrt(that
    sum))².
    """

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, error: float) -> None:
        self.gate, self.up, self.down, self.error = gate, up, down, error
        self.gate_lengths = torch.linalg.vector_norm(gate, dim=1)
        self.up_lengths = torch.linalg.vector_norm(up, dim=1)
        # 1e-30: for a row of zeros any s will do
        self.log_s = ((self.up_lengths + 1e-30) / (self.gate_lengths + 1e-30)).log() / 2
        self.exact: dict[int, Exact] = {}

    def cheap(self) -> Tensor:
        """Bounds for all rows, above and below. [2 R]

        λmax(M) <= λmax(M11) + λmax(M22), where V are the leading eigenvectors of a mean of all M, M11 is M in V and M22
        in what is left: M is positive semidefinite, so its quadratic form is at most (sqrt(λ11) x + sqrt(λ22) y)² for
        a vector with parts of lengths x and y. For the second no M is needed: with r = c − V V^T c its trace is
        t = Σ_j w_j ||r_j||², its Frobenius norm f the root of Σ_jk w_j w_k (r_j · r_k)², and of n eigenvalues with this
        sum and sum of squares none is above t / n + sqrt((n − 1) (f² − t² / n) / n) (Wolkowicz and Styan, 1980).
        """
        s = self.log_s.exp()[:, None]
        c = torch.cat(((s * self.gate + self.up / s) / 2, (s * self.gate - self.up / s) / 2))
        positive, negative = self.down.clamp(min=0), (-self.down).clamp(min=0)
        w = torch.cat((torch.cat((positive, negative), 1), torch.cat((negative, positive), 1)))
        trace = w @ c.square().sum(1)

        mean = (w / (trace + 1e-30)[:, None]).mean(0)
        common = min(_COMMON, c.shape[1])
        v = torch.linalg.eigh(c.T @ (mean[:, None] * c))[1][:, c.shape[1] - common :]
        u = c @ v
        low, high = torch.tril_indices(common, common)
        in_v = torch.zeros(len(w), common, common, dtype=torch.float64)
        in_v[:, low, high] = w @ (u[:, low] * u[:, high])  # eigvalsh reads what is on and below the diagonal
        r = c - u @ v.T
        norm, rest, left = _frobenius(w, r), w @ r.square().sum(1), max(1, c.shape[1] - common)
        spread = (norm.square() - rest.square() / left).clamp(min=0) + _LOSS * trace.square()
        of_rest = rest / left + ((left - 1) / left * spread).sqrt()
        found: Tensor = torch.linalg.eigvalsh(in_v)[:, -1] + of_rest + _LOSS * trace
        return self._with_error(found, self.down.abs().repeat(2, 1), self.log_s)

    def refine(self, index: int) -> float:
        """A better bound of row and sign `index`: λmax itself at first, then with s improved by one step per call.

        λmax of a symmetric matrix in float64 is exact up to a small multiple of its trace's last bits, which is added.
        """
        signed = self.down[index] if index < len(self.down) else -self.down[index - len(self.down)]
        before = self.exact.get(index)
        log_s = self.log_s if before is None else self._improved(before, signed)
        c = (log_s.exp()[:, None] * self.gate + (signed.sign() * (-log_s).exp())[:, None] * self.up) / 2
        c = c * signed.abs().sqrt()[:, None]
        values, vectors = torch.linalg.eigh(c.T @ c)
        few = vectors[:, -6:].clone()
        self.exact[index] = Exact(log_s=log_s, vectors=few, steps=0 if before is None else before.steps + 1)
        largest = values[-1] + _LOSS * c.square().sum()
        return float(self._with_error(largest[None], signed.abs()[None], log_s))

    def is_done(self, index: int) -> bool:
        return index in self.exact and self.exact[index].steps >= STEPS

    def _improved(self, before: Exact, signed: Tensor) -> Tensor:
        """A step against the slope of λmax: at the eigenvector v, |W| (s² (a·v)² − (b·v)² / s²) / 2 for log s.

        Eigenvectors close to the largest count too, or the next would take its place.
        """
        a, b = self.gate @ before.vectors, self.up @ before.vectors
        s = before.log_s.exp()[:, None]
        c = (s * a + signed.sign()[:, None] * b / s) / 2
        values = (signed.abs()[:, None] * c.square()).sum(0)
        share = torch.softmax((values - values[-1]) / (0.03 * values[-1] + 1e-30), 0)
        gate_part = (signed.abs()[:, None] * (s * a).square() * share).sum(1)
        up_part = (signed.abs()[:, None] * (b / s).square() * share).sum(1)
        step = 0.5 / (1 + before.steps / 10)
        both = gate_part + up_part
        return before.log_s - step * (gate_part - up_part) / (both + 0.02 * both.max() + 1e-30)

    def _with_error(self, largest: Tensor, sizes: Tensor, log_s: Tensor) -> Tensor:
        s = log_s.exp()
        added = sizes @ (s * self.gate_lengths + self.up_lengths / s).square() / 4
        root: Tensor = largest.clamp(min=0).sqrt() + self.error * added.sqrt()
        return root * root


def _frobenius(w: Tensor, r: Tensor) -> Tensor:
    """Upper bounds of ||Σ_j w_j r_j r_j^T||_F for each row of w >= 0, of r [J, E].

    In float32, at half the time: r_j · r_k is off by γ ||r_j|| ||r_k||, which changes the norm by at most γ Σ w_j
    ||r_j||²; after that all terms are positive, so that their sums are off by a γ of their own. What underflows is
    below 2^-60 once the longest r has length one.
    """
    scale: Tensor = torch.linalg.vector_norm(r, dim=1).max() + 1e-30
    narrow, weights = (r / scale).float(), w.float()
    squares: Tensor = torch.zeros(len(w), dtype=torch.float64)
    size = max(1, _BLOCK // len(r))
    for start in range(0, len(r), size):
        stop = min(start + size, len(r))
        # the matrix is symmetric: what stands above the diagonal block counts twice, what is below is left out
        for rows, times in ((slice(start, stop), 1), (slice(0, start), 2)):
            gram = (narrow[rows] @ narrow[start:stop].T).square_()
            squares += times * ((weights[:, rows] @ gram) * weights[:, start:stop]).sum(1)
    computed: Tensor = squares.sqrt() * scale**2 * (1 + sum_error(2 * len(r) + 16))
    lost: Tensor = sum_error(r.shape[1] + 8) * (w @ r.square().sum(1)) + 2.0**-60 * scale**2 * w.sum(1)
    return computed + lost


def largest_first(bounds: Tensor, refine: Callable[[int], float], is_done: Callable[[int], bool], most: int) -> Tensor:
    """`bounds` after refining the largest of them, again and again, until it is done or `most` were refined.

    Every entry returned is a valid bound, and their maximum the least known bound on the largest.
    """
    bounds = bounds.clone()
    for _ in range(most):
        index = int(bounds.argmax())
        if is_done(index):
            break
        bounds[index] = min(float(bounds[index]), refine(index))
    return bounds
