"""Bounds of attention: queries and keys through RoPE, their scores, and the values that are mixed."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import stabilitykit.bounds.inequalities as inequalities
from stabilitykit.bounds.arithmetic import WIDE, Arithmetic, Ball, outward, sum_error
from stabilitykit.bounds.recipe import Attention
from stabilitykit.bounds.weights import Bound, LayerMatrices, Weights, sums


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


class Attentions:
    """The attention of one layer after the other; some look at keys and values of an earlier one."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.recipe = weights.recipe
        self.arithmetic = weights.arithmetic
        self.values: dict[int, _Values] = {}
        self.key_gains: dict[int, Tensor] = {}

    def bounds(self, name: str, layer: LayerMatrices) -> Generator[Bound, None, Tensor]:
        """Sites of the attention; returns the bounds of `o_proj`'s channels [E]."""
        mine, arithmetic = self.recipe.attention[layer.index], self.arithmetic
        gain = layer.gains["input_layernorm"]
        yield from self.weights.normed(f"layers.{layer.index}.input_layernorm", gain)
        ball = self.weights.ball(gain)
        own = mine.source == layer.index
        for part in ("q_proj", "k_proj", "v_proj") if own else ("q_proj",):
            if part in layer.matrices:
                yield f"{name}.{part}", self.weights.projected(layer, part, ball)
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
            out_E = self.weights.summed(out_E, terms, layer.biases["o_proj"])
        yield f"{name}.o_proj", out_E
        return out_E

    def _values(self, name: str, layer: LayerMatrices, ball: Ball) -> Generator[Bound, None, _Values]:
        mine, arithmetic = self.recipe.attention[layer.index], self.arithmetic
        bias_GD = torch.zeros(mine.kv_heads, mine.head_dim, dtype=torch.float64)
        if mine.value_norm:  # whatever the projection made of it
            gain = torch.ones(mine.head_dim, dtype=torch.float64)
            normed_D = yield from self.weights.normed(f"{name}.v_norm", gain)
            return _Values(
                rows=torch.eye(mine.head_dim, dtype=torch.float64).expand(mine.kv_heads, -1, -1),
                ball=self.weights.ball(gain),
                bias=bias_GD,
                stored=normed_D.repeat(mine.kv_heads),
                off=torch.zeros(mine.kv_heads * mine.head_dim, dtype=torch.float64),
            )
        rows, bias = layer[mine.value], layer.biases.get(mine.value)
        size_C, (terms, roundings) = inequalities.linear(rows, ball), sums(rows, bias)
        if bias is not None:
            bias_GD, size_C = bias.view_as(bias_GD), size_C + bias.abs()
        return _Values(
            rows=rows.view(mine.kv_heads, mine.head_dim, -1),
            ball=ball,
            bias=bias_GD,
            stored=self.weights.projected(layer, mine.value, ball),
            off=arithmetic.product_error(terms, roundings) * size_C + arithmetic.subnormals(roundings),
        )

    def _rotation(self, name: str, part: str, first: int, layer: LayerMatrices, ball: Ball) -> Iterator[Bound]:
        """`q` or `k` on its way through RoPE. |cos| and |sin| are at most 1 as stored, up to float32's errors."""
        mine, arithmetic = self.recipe.attention[layer.index], self.arithmetic
        if mine.query_key_norm:
            gain = layer.gains[f"self_attn.{part}_norm"]
            size = yield from self.weights.normed(f"{name}.{part}_norm", gain)
            turned = inequalities.channels(arithmetic.rotated(self.weights.ball(gain)))
        else:
            rows, bias = layer[f"{part}_proj"], layer.biases.get(f"{part}_proj")
            size = self.weights.projected(layer, f"{part}_proj", ball)
            one, other = rows.view(-1, 2, mine.head_dim // 2, rows.shape[1]).unbind(1)
            terms, roundings = sums(rows, bias)
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
            score = inequalities.normed_scores(*(arithmetic.rotated(self.weights.ball(gain)) for gain in gains))
        else:
            score = self._bare_scores(mine, layer, ball)
        score = arithmetic.stored(score * (1 + sum_error(mine.head_dim)))
        yield f"{name}/matmul.0", score
        score = arithmetic.stored(score * mine.scale, 2)
        turned = 2 if mine.source == layer.index else 1  # q and k, or q alone: two products and a sum each
        yield f"{name}/mul.{2 * turned}", score
        if mine.softcap is not None:
            *steps, score = self.weights.soft_capped(score, mine.softcap)
            names = f"{name}/div.0", f"{name}/tanh.0", f"{name}/mul.{2 * turned + 1}"
            yield from zip(names, (*steps, score), strict=True)
        yield f"{name}/add.{turned}", arithmetic.stored(score, 1)
        for operator in ("softmax.0", "cast.0"):
            yield f"{name}/{operator}", self.weights.one

    def _bare_scores(self, mine: Attention, layer: LayerMatrices, ball: Ball) -> Tensor:
        groups, sides = mine.heads // mine.kv_heads, []
        for part in ("q_proj", "k_proj"):
            rows = layer[part]
            bias = layer.biases.get(part, torch.zeros(len(rows), dtype=torch.float64))
            sides.append(torch.cat((rows, bias[:, None]), 1).view(-1, mine.head_dim, rows.shape[1] + 1))
        terms, roundings = sums(layer["q_proj"], layer.biases.get("q_proj"))
        error, tiny = self.arithmetic.product_error(terms, roundings), self.arithmetic.subnormals(roundings)
        growth = self.arithmetic.rotation_growth, 4 * self.arithmetic.tiny
        query, key = sides
        heads = [
            inequalities.bare_scores(query[head], key[head // groups], ball, growth, error, tiny)
            for head in range(mine.heads)
        ]
        return torch.stack(heads).max()


def attention_weights(arithmetic: Arithmetic, keys: int) -> float:
    """What the stored probabilities of one query over `keys` keys sum to at most: 1 if nothing were rounded.

    Each exponential is divided by the computed sum of all, which is within γ of the sum of the computed ones. Storing
    adds u to each, and η where it becomes subnormal: in float16 2^-25 a key, 0.1% over 32,768 of them.
    """
    return ((1 + 4 * WIDE) / (1 - sum_error(keys))) * (1 + arithmetic.unit) + keys * arithmetic.tiny
