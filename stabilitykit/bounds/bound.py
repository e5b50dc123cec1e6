"""From a checkpoint's weights to a bound on every tensor that a run stores, layer by layer.

Names end in the tensor's shape as in `stabilitykit.models.gemma.model`.
"""

import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import stabilitykit.bounds.inequalities as inequalities
from stabilitykit.bounds.arithmetic import WIDE, Arithmetic, Ball, outward, sum_error
from stabilitykit.bounds.gated_sum import GatedSum, largest_first
from stabilitykit.checkpoints import Checkpoint, GemmaConfig
from stabilitykit.checkpoints.mapped import read_once
from stabilitykit.errors import MisuseError
from stabilitykit.formats import number_format
from stabilitykit.models.devices import parse_dtype
from stabilitykit.recorder.labels import FAMILIES, label
from stabilitykit.records.bounds import SiteBound
from stabilitykit.run.case import Progress

_REFINED = 48
"""Refinements of rows of `down_proj` in a layer; most layers of the 270M need four to twenty."""


def bound_sites(
    checkpoint: Checkpoint,
    dtype: str | torch.dtype = "float16",
    *,
    witnesses: "Callable[[int, LayerMatrices], None] | None" = None,
    progress: Progress | None = None,
) -> list[SiteBound]:
    """A bound on every site that the recorder sees in a run of this checkpoint in `dtype`, in order of execution.

    The bounds hold for the kit's own model in the arithmetic that `stabilitykit.bounds.arithmetic` states, rounding
    included, for any prompt of up to `config.context` tokens. What norms compute internally in float32 is left out. At
    most a few float64 copies of one layer's matrices are in memory at a time. `witnesses` is called with the index and
    the matrices of each layer. Raises MisuseError for a dtype that no model runs in, and for weights that are not
    finite in it.
    """
    form = number_format(str(parse_dtype(dtype)))
    config = checkpoint.config
    walk = _Walk(checkpoint, parse_dtype(dtype), Arithmetic.of(form))
    family = FAMILIES[config.model_type]
    found: list[SiteBound] = []

    def keep(sites: Iterable[tuple[str, Tensor]]) -> None:
        for site, bound in sites:
            number = re.match(r"layers\.(\d+)", site)
            found.append(
                SiteBound(
                    site=site,
                    label=label(site, family),
                    layer=int(number[1]) if number else None,
                    dtype=form.name,
                    bound=float(outward(bound.max())),
                )
            )

    keep(walk.embedding())
    for index in range(config.layers):
        if progress is not None:
            progress("bounding layers", index, config.layers)
        matrices = walk.read(index)
        keep(walk.layer(matrices))
        if witnesses is not None:
            witnesses(index, matrices)
    if progress is not None:
        progress("bounding layers", config.layers, config.layers)
    keep(walk.head())
    return found


@dataclass(slots=True)
class LayerMatrices:
    """One layer's weights, rounded to the dtype, in float64; gains are 1 + w as the model computes them in float32.

    `down` is set once the layer is bounded: the rows of `down_proj` whose bounds were refined.
    """

    index: int
    matrices: dict[str, Tensor]
    gains: dict[str, Tensor]
    down: GatedSum | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.matrices[name]


class _Walk:
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, arithmetic: Arithmetic) -> None:
        self.config: GemmaConfig = checkpoint.config
        self.tensors = checkpoint.tensors
        self.dtype = dtype
        self.arithmetic = arithmetic
        self.residual = torch.zeros(self.config.hidden_size, dtype=torch.float64)
        self.head_rows = torch.zeros(0)

    def stored(self, name: str) -> Tensor:
        """A tensor as the model stores it, in its dtype."""
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
        return (1.0 + self.stored(f"{name}.weight").float()).double()

    def ball(self, name: str) -> Ball:
        return self.arithmetic.norm_ball(self.gain(name))

    def read(self, index: int) -> LayerMatrices:
        prefix = f"layers.{index}."
        matrices, gains = {}, {}
        for name in self.tensors:
            if name.startswith(prefix):
                short = name.removeprefix(prefix).removesuffix(".weight")
                if short.endswith("norm"):
                    gains[short] = self.gain(name.removesuffix(".weight"))
                else:
                    matrices[short.rpartition(".")[2]] = self.stored(name).double()
        return LayerMatrices(index=index, matrices=matrices, gains=gains)

    def linear(self, rows: Tensor, ball: Ball) -> Tensor:
        """A bound on a stored projection, each of whose sums of products is within γ of its exact value."""
        return self.arithmetic.stored(inequalities.linear(rows, ball) * (1 + sum_error(rows.shape[1])))

    def norm(self, gain: Tensor) -> Tensor:
        """A bound on a stored norm's channels: of the ball without its share for subnormals, which are added once."""
        ball = Ball(gain.abs(), self.arithmetic.norm_radius(len(gain)))
        return outward(inequalities.channels(ball) + self.arithmetic.tiny)

    def embedding(self) -> Iterator[tuple[str, Tensor]]:
        """The cos and sin tables and the embedding's channels; the head's rows are measured in the same pass."""
        one = self.arithmetic.stored(torch.ones((), dtype=torch.float64), 4)
        for name in ("", "/cos.0", "/sin.0", "/cast.1"):
            yield f"rotary_emb{name}", one
        gain = self.ball("norm").gain
        largest = torch.zeros(self.config.hidden_size, dtype=self.dtype)
        rows = []
        for piece in read_once(self.tensors["embed_tokens.weight"]):
            stored = self.cast(piece, "embed_tokens.weight")
            largest = torch.maximum(largest, stored.abs().amax(0))
            rows.append(inequalities.linear(stored.double(), Ball(gain, 1.0)))
        self.head_rows = torch.cat(rows)
        yield "embed_tokens/embedding.0", largest.double()
        normalizer = torch.tensor(self.config.hidden_size**0.5, dtype=torch.float32).to(self.dtype).item()
        self.residual = self.arithmetic.stored(largest.double() * normalizer, 1)
        yield "embed_tokens", self.residual

    def layer(self, layer: LayerMatrices) -> Iterator[tuple[str, Tensor]]:
        name, post = f"layers.{layer.index}", self.config.post_norms
        attention = yield from self._attention(f"{name}.self_attn", layer)
        if post:
            attention = self.norm(layer.gains["post_attention_layernorm"])
            yield f"{name}.post_attention_layernorm", attention
        self.residual = self.arithmetic.stored(inequalities.added(self.residual, attention), 1)
        yield f"{name}/add.0", self.residual

        mlp = yield from self._mlp(name, "pre_feedforward_layernorm" if post else "post_attention_layernorm", layer)
        if post:
            mlp = self.norm(layer.gains["post_feedforward_layernorm"])
            yield f"{name}.post_feedforward_layernorm", mlp
        self.residual = self.arithmetic.stored(inequalities.added(self.residual, mlp), 1)
        yield name, self.residual

    def _attention(self, name: str, layer: LayerMatrices) -> Generator[tuple[str, Tensor], None, Tensor]:
        """Sites of the attention; returns the bounds of `o_proj`'s channels [E]."""
        config, arithmetic = self.config, self.arithmetic
        gain = layer.gains["input_layernorm"]
        yield f"layers.{layer.index}.input_layernorm", self.norm(gain)
        ball = arithmetic.norm_ball(gain)
        v_C = self.linear(layer["v_proj"], ball)
        for part in ("q", "k"):
            yield f"{name}.{part}_proj", self.linear(layer[f"{part}_proj"], ball)
        yield f"{name}.v_proj", v_C
        for part, first in (("q", 0), ("k", 2)):
            yield from self._rotation(name, part, first, layer, ball)

        score = arithmetic.stored(self._scores(layer, ball) * (1 + sum_error(config.head_dim)))
        yield f"{name}/matmul.0", score
        score = arithmetic.stored(score * config.query_scalar**-0.5, 2)
        yield f"{name}/mul.4", score
        if config.attention_softcap is not None:
            divided, tanh, score = self._soft_capped(score, config.attention_softcap)
            yield f"{name}/div.0", divided
            yield f"{name}/tanh.0", tanh
            yield f"{name}/mul.5", score
        # The mask is a constant: zero where a score counts. Masked scores are not bounded.
        yield f"{name}/add.2", arithmetic.stored(score, 1)
        for operator in ("softmax.0", "cast.0"):
            yield f"{name}/{operator}", arithmetic.stored(torch.ones((), dtype=torch.float64), 4)

        keys = config.context if config.is_global(layer.index) else min(config.context, config.window or 1)
        weights = attention_weights(arithmetic, keys)
        summed = 1 + sum_error(keys)
        out_C = arithmetic.stored(inequalities.mixture(v_C, weights) * summed)
        yield f"{name}/matmul.1", out_C

        groups = config.heads // config.kv_heads
        o_END = layer["o_proj"].view(config.hidden_size, config.heads, config.head_dim)
        exact_E = inequalities.mixed_heads(
            o_END, layer["v_proj"].view(config.kv_heads, config.head_dim, -1), ball, weights
        )
        # what rounding did to v and to the heads' outputs, channel by channel, and then to their sum
        size_C = inequalities.linear(layer["v_proj"], ball)
        off_C = weights * (arithmetic.product_error(config.hidden_size) * size_C + arithmetic.tiny)
        off_C = off_C + (arithmetic.product_error(keys) * weights * v_C + arithmetic.tiny)
        sizes_END = o_END.abs()
        off_ND = off_C.view(config.kv_heads, -1).repeat_interleave(groups, 0)
        out_ND = out_C.view(config.kv_heads, -1).repeat_interleave(groups, 0)
        lost_E = (sizes_END * (off_ND + sum_error(config.heads * config.head_dim) * out_ND)).sum((1, 2))
        out_E = arithmetic.stored(exact_E + lost_E)
        yield f"{name}.o_proj", out_E
        return out_E

    def _rotation(
        self, name: str, part: str, first: int, layer: LayerMatrices, ball: Ball
    ) -> Iterator[tuple[str, Tensor]]:
        """`q` or `k` on its way through RoPE. |cos| and |sin| are at most 1 as stored, up to float32's errors."""
        arithmetic, rows = self.arithmetic, layer[f"{part}_proj"]
        if self.config.query_key_norm:
            gain = layer.gains[f"self_attn.{part}_norm"]
            size = self.norm(gain)
            yield f"{name}.{part}_norm", size
            turned = inequalities.channels(arithmetic.rotated(arithmetic.norm_ball(gain)))
        else:
            size = self.linear(rows, ball)
            one, other = rows.view(-1, 2, self.config.head_dim // 2, rows.shape[1]).unbind(1)
            off = arithmetic.product_error(rows.shape[1])
            length = inequalities.length_of_pair(one, other, ball) * (1 + 2**0.5 * off) + 2**0.5 * arithmetic.tiny
            turned = length * arithmetic.rotation_growth + arithmetic.rotation_tiny
        operator = first // 2
        product = arithmetic.stored(size, 4)
        yield f"{name}/mul.{first}", product
        yield f"{name}/neg.{operator}", size
        yield f"{name}/mul.{first + 1}", product
        yield f"{name}/add.{operator}", outward(turned)

    def _scores(self, layer: LayerMatrices, ball: Ball) -> Tensor:
        config, arithmetic = self.config, self.arithmetic
        if config.query_key_norm:
            query, key = (
                arithmetic.rotated(arithmetic.norm_ball(layer.gains[f"self_attn.{part}_norm"])) for part in "qk"
            )
            return inequalities.normed_scores(query, key)
        q_NDE = layer["q_proj"].view(config.heads, config.head_dim, -1)
        k_GDE = layer["k_proj"].view(config.kv_heads, config.head_dim, -1)
        groups = config.heads // config.kv_heads
        return torch.stack(
            [
                inequalities.bare_scores(
                    q_NDE[head],
                    k_GDE[head // groups],
                    ball,
                    arithmetic.rotation_growth,
                    arithmetic.product_error(config.hidden_size),
                    arithmetic.tiny,
                )
                for head in range(config.heads)
            ]
        ).max()

    def _mlp(self, name: str, norm: str, layer: LayerMatrices) -> Generator[tuple[str, Tensor], None, Tensor]:
        """Sites of the MLP; returns the bounds of `down_proj`'s channels [E]."""
        arithmetic = self.arithmetic
        gain = layer.gains[norm]
        yield f"{name}.{norm}", self.norm(gain)
        ball = arithmetic.norm_ball(gain)
        gate, up, down = layer["gate_proj"], layer["up_proj"], layer["down_proj"]
        gate_F, up_F = self.linear(gate, ball), self.linear(up, ball)
        dip = arithmetic.stored(torch.tensor(inequalities.GELU_DIP, dtype=torch.float64), 8)
        yield f"{name}.mlp.gate_proj", gate_F
        yield f"{name}.mlp/gelu.0", torch.maximum(arithmetic.stored(gate_F, 8), dip)
        yield f"{name}.mlp.up_proj", up_F

        # x and y of x · y are each off by `off` of their largest, and by a subnormal; gelu is rounded before
        off = arithmetic.product_error(gate.shape[1])
        sizes = inequalities.linear(gate, ball), inequalities.linear(up, ball)
        product_F = inequalities.gated(gate, up, ball) + (2 * off + off**2) * sizes[0] * sizes[1]
        product_F = product_F + arithmetic.tiny * (1 + off) * (sizes[0] + sizes[1]) + arithmetic.tiny**2
        product_F = product_F * (1 + arithmetic.unit) * (1 + WIDE) ** 8 + arithmetic.tiny * up_F
        yield f"{name}.mlp/mul.0", arithmetic.stored(torch.maximum(product_F, dip * up_F), 1)

        layer.down = GatedSum(gate * ball.gain, up * ball.gain, down, sum_error(gate.shape[1]))
        square = largest_first(layer.down.cheap(), layer.down.refine, layer.down.is_done, _REFINED)
        out_E = self._down(square * ball.radius**2, layer, ball, float(dip))
        yield f"{name}.mlp.down_proj", out_E
        return out_E

    def _down(self, positive: Tensor, layer: LayerMatrices, ball: Ball, dip: float) -> Tensor:
        """Bounds of `down_proj`'s channels as stored [E], from those of its sum over max(x, 0) · y by row and sign.

        gelu(x) is max(x, 0) plus at most `dip`, so Σ |W_j| dip |y_j| <= dip ||W_i||_2 ||y||_2 is added, where ||y|| <=
        r σmax(B) and what rounding adds. Four roundings of relative size u stand on each term: of x, y, gelu, the
        product. Subnormals add η |x_j|, η |y_j| or η. The sum of |terms| that γ applies to is at most the bound from
        above and that from below together.
        """
        arithmetic, down = self.arithmetic, layer["down_proj"]
        lengths = {}
        for part in ("gate_proj", "up_proj"):
            rows = layer[part] * ball.gain
            spectral = torch.linalg.eigvalsh(rows.T @ rows)[-1].clamp(min=0).sqrt()
            off = arithmetic.product_error(rows.shape[1]) * torch.linalg.matrix_norm(rows)
            lengths[part] = outward(ball.radius * (spectral + off)) + arithmetic.tiny * len(rows) ** 0.5
        weight = torch.linalg.vector_norm(down, dim=1)
        rounded = (1 + arithmetic.unit) ** 4 * (1 + WIDE) ** 9
        beside = dip * lengths["up_proj"] * weight
        beside = beside + arithmetic.tiny * weight * (
            lengths["gate_proj"] + 2 * lengths["up_proj"] + len(down.T) ** 0.5
        )
        above, below = ((part + beside) * rounded for part in positive.chunk(2))
        added = sum_error(down.shape[1]) * (above + below)
        return arithmetic.stored(torch.maximum(above, below) + added)

    def head(self) -> Iterator[tuple[str, Tensor]]:
        """The final norm and the logits."""
        arithmetic, cap = self.arithmetic, self.config.logit_softcap
        yield "norm", self.norm(self.gain("norm"))
        radius = self.ball("norm").radius
        logits = arithmetic.stored(self.head_rows.max() * radius * (1 + sum_error(self.config.hidden_size)))
        yield "lm_head", logits
        if cap is not None:
            yield from zip(("/div.0", "/tanh.0", "/mul.0"), self._soft_capped(logits, cap), strict=True)

    def _soft_capped(self, x: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
        """x ÷ cap, its tanh, and the soft-capped value, each as stored."""
        divided = self.arithmetic.stored(x / cap, 2)
        tanh = self.arithmetic.stored(inequalities.soft_capped(divided, 1.0), 8)
        return divided, tanh, self.arithmetic.stored(tanh * cap, 2)


def attention_weights(arithmetic: Arithmetic, keys: int) -> float:
    """What the stored probabilities of one query over `keys` keys sum to at most: 1 if nothing were rounded.

    Each exponential is divided by the computed sum of all, which is within γ of the sum of the computed ones. Storing
    adds u to each, and η where it becomes subnormal: in float16 2^-25 a key, 0.1% over 32,768 of them.
    """
    return ((1 + 4 * WIDE) / (1 - sum_error(keys))) * (1 + arithmetic.unit) + keys * arithmetic.tiny
