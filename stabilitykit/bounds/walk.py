"""From a decoder's weights to a bound on every tensor that a run stores, in order of execution."""

import math
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

import stabilitykit.bounds.inequalities as inequalities
from stabilitykit.bounds.arithmetic import WIDE, Arithmetic, Ball
from stabilitykit.bounds.attention import Attentions
from stabilitykit.bounds.mlp import mlp
from stabilitykit.bounds.recipe import Decoder
from stabilitykit.bounds.weights import Bound, LayerMatrices, Weights

_MIXTURE = "no inequality is known for what experts make of a token before they are weighed and normalised"


class Walk(Weights):
    """The bounds of one decoder's tensors; each method goes on from where the one before it ended."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, arithmetic: Arithmetic) -> None:
        super().__init__(decoder, dtype, arithmetic)
        self.attentions = Attentions(self)
        self.residual = torch.zeros(self.recipe.hidden_size, dtype=torch.float64)
        self.own_input = torch.zeros(0, dtype=torch.float64)
        self.longest_row = 0.0

    def embedding(self) -> Iterator[Bound]:
        """The cos and sin tables, the embedding's channels, and what of it is each layer's own input."""
        recipe = self.recipe
        for name in recipe.sites.tables:
            yield f"rotary_emb{name}", self.one
        largest = torch.zeros(recipe.hidden_size, dtype=self.dtype)
        for piece in self.rows("embed_tokens.weight"):
            largest = torch.maximum(largest, piece.abs().amax(0))
            if recipe.own_input:
                lengths = torch.linalg.vector_norm(piece.double(), dim=1)
                self.longest_row = max(self.longest_row, float(lengths.max()))
        self.residual = yield from self.scaled("embed_tokens", largest.double(), recipe.embedding_scale)
        if recipe.own_input:
            yield from self._own_inputs()

    def scaled(self, site: str, largest: Tensor, scale: float | None) -> Generator[Bound, None, Tensor]:
        """An embedding's channels, multiplied by `scale` as stored."""
        if scale is not None:
            yield f"{site}/embedding.0", largest
            largest = self.arithmetic.stored(largest * self.rounded(scale), 1)
        yield site, largest
        return largest

    def _own_inputs(self) -> Iterator[Bound]:
        """Gemma 4's input of each layer [layers, P]: its own embedding, and a projection of the embedding, normed."""
        recipe, arithmetic = self.recipe, self.arithmetic
        shape = recipe.layers, recipe.own_input
        columns = torch.zeros(math.prod(shape), dtype=self.dtype)
        for piece in self.rows("embed_tokens_per_layer.weight"):
            columns = torch.maximum(columns, piece.abs().amax(0))
        own = yield from self.scaled("embed_tokens_per_layer", columns.double(), recipe.own_input**0.5)
        rows = self.stored("per_layer_model_projection.weight").double()
        length = self.longest_row * self.rounded(recipe.embedding_scale or 1.0) * (1 + WIDE) * (1 + arithmetic.unit)
        ball = Ball(torch.ones(recipe.hidden_size).double(), length + recipe.hidden_size**0.5 * arithmetic.tiny)
        exact = torch.minimum(inequalities.linear(rows, ball), inequalities.boxed(rows, self.residual))
        projected = self.summed(exact, recipe.hidden_size)
        yield "per_layer_model_projection", projected
        yield "/mul.0", arithmetic.stored(projected * recipe.hidden_size**-0.5, 2)
        normed = yield from self.normed("per_layer_projection_norm", self.gain("per_layer_projection_norm"))
        both = arithmetic.stored(inequalities.added(own.view(shape), normed), 1)
        yield "/add.0", both
        self.own_input = arithmetic.stored(both * 2.0**-0.5, 2)
        yield "/mul.1", self.own_input

    def layer(self, layer: LayerMatrices) -> Iterator[Bound]:
        name, post = f"layers.{layer.index}", self.recipe.post_norms
        sublayer = yield from self.attentions.bounds(f"{name}.self_attn", layer)
        if post:
            sublayer = yield from self.normed(
                f"{name}.post_attention_layernorm", layer.gains["post_attention_layernorm"]
            )
        yield self.add(f"{name}/add.0", sublayer)

        before_mlp = "pre_feedforward_layernorm" if post else "post_attention_layernorm"
        sublayer = yield from mlp(self, name, before_mlp, layer)
        adds = 1
        if self.recipe.experts:
            yield from self._experts(name, layer)
            adds = 2
        if post:
            sublayer = yield from self.normed(
                f"{name}.post_feedforward_layernorm", layer.gains["post_feedforward_layernorm"]
            )
        last = not (self.recipe.own_input or self.recipe.layer_scalar)
        yield self.add(name if last else f"{name}/add.{adds}", sublayer)

        if self.recipe.own_input:
            sublayer = yield from self._gated_input(name, layer)
            yield self.add(f"{name}/add.{adds + 1}" if self.recipe.layer_scalar else name, sublayer)
        if self.recipe.layer_scalar:
            self.residual = self.arithmetic.stored(self.residual * layer.scalar, 1)
            yield name, self.residual

    def _experts(self, name: str, layer: LayerMatrices) -> Iterator[Bound]:
        """A router and experts beside the MLP: both are normalised, added, and normalised again."""
        arithmetic, hidden = self.arithmetic, self.recipe.hidden_size
        scale = self.stored(f"{name}.router.scale").double().abs()
        beside = yield from self.normed(
            f"{name}.post_feedforward_layernorm_1", layer.gains["post_feedforward_layernorm_1"]
        )
        routed = yield from self.normed(f"{name}.router.norm", torch.ones(hidden, dtype=torch.float64))
        routed = arithmetic.stored(routed * scale, 1)
        yield f"{name}.router/mul.0", routed
        routed = arithmetic.stored(routed * hidden**-0.5, 2)
        yield f"{name}.router/mul.1", routed
        yield f"{name}.router.proj", self.summed(inequalities.boxed(layer["proj"], routed), hidden)
        yield from self.normed(f"{name}.pre_feedforward_layernorm_2", layer.gains["pre_feedforward_layernorm_2"])
        yield f"{name}.experts", _MIXTURE
        mixed = yield from self.normed(
            f"{name}.post_feedforward_layernorm_2", layer.gains["post_feedforward_layernorm_2"]
        )
        yield f"{name}/add.1", arithmetic.stored(inequalities.added(beside, mixed), 1)

    def add(self, site: str, sublayer: Tensor) -> Bound:
        self.residual = self.arithmetic.stored(inequalities.added(self.residual, sublayer), 1)
        return site, self.residual

    def _gated_input(self, name: str, layer: LayerMatrices) -> Generator[Bound, None, Tensor]:
        """A layer's own input, gated by the residual stream, which no norm has bounded: channel by channel."""
        gate, back = layer["per_layer_input_gate"], layer["per_layer_projection"]
        gate_P = self.summed(inequalities.boxed(gate, self.residual), gate.shape[1])
        yield f"{name}.per_layer_input_gate", gate_P
        active_P = torch.maximum(self.arithmetic.stored(gate_P, 8), self.dip)
        yield f"{name}.act_fn", active_P
        gated_P = self.arithmetic.stored(active_P * self.own_input[layer.index], 1)
        yield f"{name}/mul.0", gated_P
        yield f"{name}.per_layer_projection", self.summed(inequalities.boxed(back, gated_P), back.shape[1])
        norm = "post_per_layer_input_norm"
        return (yield from self.normed(f"{name}.{norm}", layer.gains[norm]))

    def head(self) -> Iterator[Bound]:
        """The final norm and the logits."""
        gain, cap = self.gain("norm"), self.recipe.logit_softcap
        yield from self.normed("norm", gain)
        ball = self.ball(gain)
        largest = [inequalities.linear(piece.double(), ball).max() for piece in self.rows(f"{self.recipe.head}.weight")]
        logits = self.summed(torch.stack(largest).max(), self.recipe.hidden_size)
        yield "lm_head", logits
        if cap is not None:
            yield from zip(("/div.0", "/tanh.0", "/mul.0"), self.soft_capped(logits, cap), strict=True)
