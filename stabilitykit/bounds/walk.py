"""From a decoder's weights to a bound on every tensor that a run stores, in order of execution.

Names end in the tensor's shape: E hidden channels, F those of the MLP, N heads of D channels each, G heads of keys and
values, C their G · D channels, P those of a layer's own input.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import stabilitykit.bounds.inequalities as inequalities
from stabilitykit.bounds.arithmetic import WIDE, Arithmetic, Ball, outward, sum_error
from stabilitykit.bounds.gated_sum import GatedSum, largest_first
from stabilitykit.bounds.recipe import Attention, Decoder
from stabilitykit.checkpoints.mapped import read_once
from stabilitykit.errors import CheckpointError, MisuseError

_REFINED = 48
"""Refinements of rows of `down_proj` in a layer; most layers of the 270M need four to twenty."""

Bound = tuple[str, Tensor | str]
"""A site, and the bounds of its channels, or why there are none."""

_MIXTURE = "no inequality is known for what experts make of a token before they are weighed and normalised"


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


@dataclass(frozen=True, slots=True)
class _Values:
    """What attention mixes: V y + bias by heads, `rows` V [G, D, E] and `bias` [G, D], for y in `ball`.

    `stored` [C] bounds it as stored, and `off` [C] what rounding did to it.
    """

    rows: Tensor
    ball: Ball
    bias: Tensor
    stored: Tensor
    off: Tensor


class Walk:
    """The bounds of one decoder's tensors; each method goes on from where the one before it ended."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, arithmetic: Arithmetic) -> None:
        self.recipe = decoder.recipe
        self.source = decoder.source
        self.tensors = decoder.tensors
        self.dtype = dtype
        self.arithmetic = arithmetic
        self.residual = torch.zeros(self.recipe.hidden_size, dtype=torch.float64)
        self.own_input = torch.zeros(0, dtype=torch.float64)
        self.longest_row = 0.0
        self.values: dict[int, _Values] = {}
        self.key_gains: dict[int, Tensor] = {}
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
                "there. List them with `stabilitykit forecast`, or choose a dtype that holds them."
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

    def rows(self, name: str) -> Iterator[Tensor]:
        """A large matrix as stored, a few rows at a time."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.source} lacks {name}, which its config asks for.")
        return (self.cast(piece, name) for piece in read_once(self.tensors[name]))

    def scaled(self, site: str, largest: Tensor, scale: float | None) -> Generator[Bound, None, Tensor]:
        """An embedding's channels, multiplied by `scale` as stored."""
        if scale is not None:
            yield f"{site}/embedding.0", largest
            largest = self.arithmetic.stored(largest * self.rounded(scale), 1)
        yield site, largest
        return largest

    def rounded(self, number: float) -> float:
        return torch.tensor(number, dtype=torch.float32).to(self.dtype).item()

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
        sublayer = yield from self._attention(f"{name}.self_attn", layer)
        if post:
            sublayer = yield from self.normed(
                f"{name}.post_attention_layernorm", layer.gains["post_attention_layernorm"]
            )
        yield self.add(f"{name}/add.0", sublayer)

        before_mlp = "pre_feedforward_layernorm" if post else "post_attention_layernorm"
        sublayer = yield from self._mlp(name, before_mlp, layer)
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

    def _attention(self, name: str, layer: LayerMatrices) -> Generator[Bound, None, Tensor]:
        """Sites of the attention; returns the bounds of `o_proj`'s channels [E]."""
        mine, arithmetic = self.recipe.attention[layer.index], self.arithmetic
        gain = layer.gains["input_layernorm"]
        yield from self.normed(f"layers.{layer.index}.input_layernorm", gain)
        ball = self.ball(gain)
        own = mine.source == layer.index
        for part in ("q_proj", "k_proj", "v_proj") if own else ("q_proj",):
            if part in layer.matrices:
                yield f"{name}.{part}", self.projected(layer, part, ball)
        yield from self._rotation(name, "q", 0, layer, ball)
        if own:
            yield from self._rotation(name, "k", 2, layer, ball)
            self.values[layer.index] = yield from self._values(name, layer, ball)
            if mine.query_key_norm:
                self.key_gains[layer.index] = layer.gains["self_attn.k_norm"]
        yield from self._scores(name, layer, ball)

        values, groups = self.values[mine.source], mine.heads // mine.kv_heads
        weights = attention_weights(arithmetic, mine.keys)
        out_C = arithmetic.stored(inequalities.mixture(values.stored, weights) * (1 + sum_error(mine.keys)))
        yield f"{name}/matmul.1", out_C

        o_END = layer["o_proj"].view(self.recipe.hidden_size, mine.heads, mine.head_dim)
        exact_E = inequalities.mixed_heads(o_END, values.rows, values.bias, values.ball, weights)
        # what rounding did to v and to the heads' outputs, channel by channel, and then to their sum
        off_C = weights * values.off
        off_C = off_C + (arithmetic.product_error(mine.keys) * weights * values.stored + arithmetic.tiny)
        sizes_END = o_END.abs()
        off_ND = off_C.view(mine.kv_heads, -1).repeat_interleave(groups, 0)
        out_ND = out_C.view(mine.kv_heads, -1).repeat_interleave(groups, 0)
        terms = mine.heads * mine.head_dim
        lost_E = (sizes_END * (off_ND + sum_error(terms) * out_ND)).sum((1, 2))
        out_E = arithmetic.stored(exact_E + lost_E)
        if "o_proj" in layer.biases:
            out_E = self.summed(out_E, terms, layer.biases["o_proj"])
        yield f"{name}.o_proj", out_E
        return out_E

    def _values(self, name: str, layer: LayerMatrices, ball: Ball) -> Generator[Bound, None, _Values]:
        mine, arithmetic = self.recipe.attention[layer.index], self.arithmetic
        bias_GD = torch.zeros(mine.kv_heads, mine.head_dim, dtype=torch.float64)
        if mine.value_norm:  # whatever the projection made of it
            gain = torch.ones(mine.head_dim, dtype=torch.float64)
            normed_D = yield from self.normed(f"{name}.v_norm", gain)
            return _Values(
                rows=torch.eye(mine.head_dim, dtype=torch.float64).expand(mine.kv_heads, -1, -1),
                ball=self.ball(gain),
                bias=bias_GD,
                stored=normed_D.repeat(mine.kv_heads),
                off=torch.zeros(mine.kv_heads * mine.head_dim, dtype=torch.float64),
            )
        rows, bias = layer[mine.value], layer.biases.get(mine.value)
        size_C, (terms, roundings) = inequalities.linear(rows, ball), _sums(rows, bias)
        if bias is not None:
            bias_GD, size_C = bias.view_as(bias_GD), size_C + bias.abs()
        return _Values(
            rows=rows.view(mine.kv_heads, mine.head_dim, -1),
            ball=ball,
            bias=bias_GD,
            stored=self.projected(layer, mine.value, ball),
            off=arithmetic.product_error(terms, roundings) * size_C + arithmetic.subnormals(roundings),
        )

    def _rotation(self, name: str, part: str, first: int, layer: LayerMatrices, ball: Ball) -> Iterator[Bound]:
        """`q` or `k` on its way through RoPE. |cos| and |sin| are at most 1 as stored, up to float32's errors."""
        mine, arithmetic = self.recipe.attention[layer.index], self.arithmetic
        if mine.query_key_norm:
            gain = layer.gains[f"self_attn.{part}_norm"]
            size = yield from self.normed(f"{name}.{part}_norm", gain)
            turned = inequalities.channels(arithmetic.rotated(self.ball(gain)))
        else:
            rows, bias = layer[f"{part}_proj"], layer.biases.get(f"{part}_proj")
            size = self.projected(layer, f"{part}_proj", ball)
            one, other = rows.view(-1, 2, mine.head_dim // 2, rows.shape[1]).unbind(1)
            terms, roundings = _sums(rows, bias)
            off = arithmetic.product_error(terms, roundings)
            length = inequalities.length_of_pair(one, other, ball) * (1 + 2**0.5 * off)
            if bias is not None:
                length = length + torch.linalg.vector_norm(bias.view(-1, 2, mine.head_dim // 2), dim=1) * (1 + off)
            length = length + 2**0.5 * arithmetic.subnormals(roundings)
            turned = length * arithmetic.rotation_growth + arithmetic.rotation_tiny
        operator = first // 2
        product = arithmetic.stored(size, 4)
        yield f"{name}/mul.{first}", product
        yield f"{name}/neg.{operator}", size
        yield f"{name}/mul.{first + 1}", product
        yield f"{name}/add.{operator}", outward(turned)

    def _scores(self, name: str, layer: LayerMatrices, ball: Ball) -> Iterator[Bound]:
        """The mask is a constant: zero where a score counts. Masked scores are not bounded."""
        mine, arithmetic = self.recipe.attention[layer.index], self.arithmetic
        if mine.query_key_norm:
            gains = layer.gains["self_attn.q_norm"], self.key_gains[mine.source]
            score = inequalities.normed_scores(*(arithmetic.rotated(self.ball(gain)) for gain in gains))
        else:
            score = self._bare_scores(mine, layer, ball)
        score = arithmetic.stored(score * (1 + sum_error(mine.head_dim)))
        yield f"{name}/matmul.0", score
        score = arithmetic.stored(score * mine.scale, 2)
        yield f"{name}/mul.4", score
        if mine.softcap is not None:
            *steps, score = self._soft_capped(score, mine.softcap)
            yield from zip((f"{name}/div.0", f"{name}/tanh.0", f"{name}/mul.5"), (*steps, score), strict=True)
        yield f"{name}/add.2", arithmetic.stored(score, 1)
        for operator in ("softmax.0", "cast.0"):
            yield f"{name}/{operator}", self.one

    def _bare_scores(self, mine: Attention, layer: LayerMatrices, ball: Ball) -> Tensor:
        groups, sides = mine.heads // mine.kv_heads, []
        for part in ("q_proj", "k_proj"):
            rows = layer[part]
            bias = layer.biases.get(part, torch.zeros(len(rows), dtype=torch.float64))
            sides.append(torch.cat((rows, bias[:, None]), 1).view(-1, mine.head_dim, rows.shape[1] + 1))
        terms, roundings = _sums(layer["q_proj"], layer.biases.get("q_proj"))
        error, tiny = self.arithmetic.product_error(terms, roundings), self.arithmetic.subnormals(roundings)
        growth = self.arithmetic.rotation_growth, 4 * self.arithmetic.tiny
        query, key = sides
        heads = [
            inequalities.bare_scores(query[head], key[head // groups], ball, growth, error, tiny)
            for head in range(mine.heads)
        ]
        return torch.stack(heads).max()

    def _mlp(self, name: str, norm: str, layer: LayerMatrices) -> Generator[Bound, None, Tensor]:
        """Sites of the MLP; returns the bounds of `down_proj`'s channels [E]."""
        arithmetic = self.arithmetic
        yield from self.normed(f"{name}.{norm}", layer.gains[norm])
        ball = self.ball(layer.gains[norm])
        gate_F, up_F = self.projected(layer, "gate_proj", ball), self.projected(layer, "up_proj", ball)
        yield f"{name}.mlp.gate_proj", gate_F
        yield f"{name}.mlp{self.recipe.sites.activated}", torch.maximum(arithmetic.stored(gate_F, 8), self.dip)
        yield f"{name}.mlp.up_proj", up_F

        gate, up = layer["gate_proj"], layer["up_proj"]
        terms, roundings = _sums(gate, layer.biases.get("gate_proj"))
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
        yield f"{name}.mlp/mul.0", arithmetic.stored(torch.maximum(product_F, self.dip * up_F), 1)

        layer.down = GatedSum(gate * ball.gain, up * ball.gain, layer["down_proj"], sum_error(terms))
        square = largest_first(layer.down.cheap(), layer.down.refine, layer.down.is_done, _REFINED)
        long_gate, long_up = (self._length(rows * ball.gain, ball.radius, off, tiny) for rows in (gate, up))
        out_E = self._down(square * ball.radius**2, layer, long_gate, long_up, roundings)
        yield f"{name}.mlp.down_proj", out_E
        return out_E

    def _length(self, rows: Tensor, radius: float, off: float, tiny: float) -> Tensor:
        """Of all a projection's channels together, as stored."""
        small = rows.T @ rows if rows.shape[1] <= rows.shape[0] else rows @ rows.T
        spectral = torch.linalg.eigvalsh(small)[-1].clamp(min=0).sqrt()
        length: Tensor = outward(radius * (spectral + off * torch.linalg.matrix_norm(rows))) + tiny * len(rows) ** 0.5
        return length

    def _down(self, positive: Tensor, layer: LayerMatrices, gate: Tensor, up: Tensor, roundings: int) -> Tensor:
        """Bounds of `down_proj`'s channels as stored [E], from those of its sum over max(x, 0) · y by row and sign.

        The activation is max(x, 0) plus at most `dip`, so Σ |W_j| dip |y_j| <= dip ||W_i||_2 ||y||_2 is added, where
        `gate` and `up` are the lengths of x and y. Four roundings of relative size u stand on each term: of x, y, the
        activation, the product; two more where x and y have a bias. Subnormals add η |x_j|, η |y_j| or η. The sum of
        |terms| that γ applies to is at most the bound from above and that from below together.
        """
        arithmetic, down, bias = self.arithmetic, layer["down_proj"], layer.biases.get("down_proj")
        weight, tiny = torch.linalg.vector_norm(down, dim=1), arithmetic.tiny
        rounded = (1 + arithmetic.unit) ** (2 + 2 * roundings) * (1 + WIDE) ** 9
        beside = self.dip * up * weight + arithmetic.subnormals(roundings) * weight * (gate + up)
        beside = beside + tiny * weight * (up + len(down.T) ** 0.5)
        above, below = ((part + beside) * rounded for part in positive.chunk(2))
        added = sum_error(down.shape[1]) * (above + below)
        out_E = arithmetic.stored(torch.maximum(above, below) + added)
        return out_E if bias is None else self.summed(out_E, down.shape[1], bias)

    def head(self) -> Iterator[Bound]:
        """The final norm and the logits."""
        gain, cap = self.gain("norm"), self.recipe.logit_softcap
        yield from self.normed("norm", gain)
        ball = self.ball(gain)
        largest = [inequalities.linear(piece.double(), ball).max() for piece in self.rows(f"{self.recipe.head}.weight")]
        logits = self.summed(torch.stack(largest).max(), self.recipe.hidden_size)
        yield "lm_head", logits
        if cap is not None:
            yield from zip(("/div.0", "/tanh.0", "/mul.0"), self._soft_capped(logits, cap), strict=True)

    def _soft_capped(self, x: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
        """x ÷ cap, its tanh, and the soft-capped value, each as stored."""
        divided = self.arithmetic.stored(x / cap, 2)
        tanh = self.arithmetic.stored(inequalities.soft_capped(divided, 1.0), 8)
        return divided, tanh, self.arithmetic.stored(tanh * cap, 2)


def _sums(rows: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Terms of each sum of products, and how often it is rounded: a bias may be added before or after."""
    return (rows.shape[1], 1) if bias is None else (rows.shape[1] + 1, 2)


def attention_weights(arithmetic: Arithmetic, keys: int) -> float:
    """What the stored probabilities of one query over `keys` keys sum to at most: 1 if nothing were rounded.

    Each exponential is divided by the computed sum of all, which is within γ of the sum of the computed ones. Storing
    adds u to each, and η where it becomes subnormal: in float16 2^-25 a key, 0.1% over 32,768 of them.
    """
    return ((1 + 4 * WIDE) / (1 - sum_error(keys))) * (1 + arithmetic.unit) + keys * arithmetic.tiny
