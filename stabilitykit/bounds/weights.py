"""A decoder's weights as a run stores them, and the bounds that every part of a layer needs: of norms and projections.

Names end in the tensor's shape: E hidden channels, F those of the MLP, N heads of D channels each, G heads of keys and
values, C their G · D channels, P those of a layer's own input.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import stabilitykit.bounds.inequalities as inequalities
from stabilitykit.bounds.arithmetic import Arithmetic, Ball, outward, sum_error
from stabilitykit.bounds.gated_sum import GatedSum
from stabilitykit.bounds.recipe import Decoder
from stabilitykit.checkpoints.mapped import read_once
from stabilitykit.commands import again
from stabilitykit.errors import CheckpointError, MisuseError

Bound = tuple[str, Tensor | str]
"""A site, and the bounds of its channels, or why there are none."""


@dataclass(slots=True)
class LayerMatrices:
    """One layer's weights, rounded to the dtype, in float64; gains as the model computes them in float32.

    `down` is set once the layer is bounded: the rows of `down_proj` whose bounds were refined.
    """

    index: int
    matrices: dict[str, Tensor]
    gains: dict[str, Tensor]
    biases: dict[str, Tensor] = field(default_factory=dict)
    scalar: float = 1.0
    down: GatedSum | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.matrices[name]


class Weights:
    """What one decoder's tensors are in a dtype. `one` and `dip` bound a probability and an activation below zero."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, arithmetic: Arithmetic) -> None:
        self.recipe = decoder.recipe
        self.source = decoder.source
        self.tensors = decoder.tensors
        self.dtype = dtype
        self.arithmetic = arithmetic
        one = torch.ones((), dtype=torch.float64)
        self.one = arithmetic.stored(one, 4)
        self.dip = arithmetic.stored(inequalities.DIPS[self.recipe.activation] * one, 8)

    def stored(self, name: str) -> Tensor:
        """A tensor as the model stores it, in its dtype."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.source} lacks {name}, which its config asks for.")
        return self.cast(self.tensors[name], name)

    def cast(self, tensor: Tensor, name: str) -> Tensor:
        cast = tensor.to(self.dtype)
        if not bool(cast.isfinite().all()):
            raise MisuseError(
                f"Cannot bound {name} in {str(self.dtype).removeprefix('torch.')}: some of its weights are not finite "
                f"there. List them with `{again('forecast', self.source)}`, or choose a dtype that holds them."
            )
        return cast

    def gain(self, name: str) -> Tensor:
        return (self.recipe.added + self.stored(f"{name}.weight").float()).double()

    def ball(self, gain: Tensor) -> Ball:
        return self.arithmetic.norm_ball(gain, twice=self.recipe.rounds_before_gain)

    def read(self, index: int) -> LayerMatrices:
        prefix = f"layers.{index}."
        layer = LayerMatrices(index=index, matrices={}, gains={})
        for name in self.tensors:
            short, _, kind = name.removeprefix(prefix).rpartition(".")
            if not name.startswith(prefix):
                continue
            if "norm" in short.rpartition(".")[2]:
                layer.gains[short] = self.gain(name.removesuffix(".weight"))
            elif kind == "weight" and self.tensors[name].ndim == 2:
                layer.matrices[short.rpartition(".")[2]] = self.stored(name).double()
            elif kind == "bias" and short.rpartition(".")[2] in self.recipe.biases:
                layer.biases[short.rpartition(".")[2]] = self.stored(name).double()
            elif kind == "layer_scalar" and self.recipe.layer_scalar:
                layer.scalar = float(self.stored(name).double().abs().max())
        return layer

    def normed(self, site: str, gain: Tensor) -> Generator[Bound, None, Tensor]:
        """A norm's channels: of the ball without its share for subnormals, which are added once."""
        twice = self.recipe.rounds_before_gain
        ball = Ball(gain.abs(), self.arithmetic.norm_radius(len(gain), twice=twice))
        if twice:
            yield f"{site}/cast.0", torch.tensor(ball.radius, dtype=torch.float64)
        bound = outward(inequalities.channels(ball) + self.arithmetic.tiny)
        yield site, bound
        return bound

    def projected(self, layer: LayerMatrices, part: str, ball: Ball) -> Tensor:
        """A bound on a stored projection, each of whose sums of products is within γ of its exact value."""
        return self.summed(inequalities.linear(layer[part], ball), layer[part].shape[1], layer.biases.get(part))

    def summed(self, exact: Tensor, terms: int, bias: Tensor | None = None) -> Tensor:
        """A bound on stored sums of products, from one on what they are exactly; a bias may follow their rounding."""
        if bias is None:
            return self.arithmetic.stored(exact * (1 + sum_error(terms)))
        return self.arithmetic.stored(self.arithmetic.stored((exact + bias.abs()) * (1 + sum_error(terms + 1))), 1)

    def rows(self, name: str) -> Iterator[Tensor]:
        """A large matrix as stored, a few rows at a time."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.source} lacks {name}, which its config asks for.")
        return (self.cast(piece, name) for piece in read_once(self.tensors[name]))

    def rounded(self, number: float) -> float:
        return torch.tensor(number, dtype=torch.float32).to(self.dtype).item()

    def soft_capped(self, x: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
        """x ÷ cap, its tanh, and the soft-capped value, each as stored."""
        divided = self.arithmetic.stored(x / cap, 2)
        tanh = self.arithmetic.stored(inequalities.soft_capped(divided, 1.0), 8)
        return divided, tanh, self.arithmetic.stored(tanh * cap, 2)


def sums(rows: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Terms of each sum of products, and how often it is rounded: a bias may be added before or after."""
    return (rows.shape[1], 1) if bias is None else (rows.shape[1] + 1, 2)
