"""Hidden states that come close to the bounds of a layer, confirmed by running its modules.

The state that enters a norm may be any vector. Prompts reach fewer, so the result says how tight a bound is, not that
a prompt leads there. Where an inequality is tight the state has a closed form; for `down_proj` it is found by gradient
ascent. The residual stream has no such search: the state is the residual stream.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabilitykit.bounds.weights import LayerMatrices
from stabilitykit.checkpoints import Checkpoint, GemmaConfig
from stabilitykit.checkpoints.checkpoint import LazyTensors
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.gemma.model import rope_frequencies
from stabilitykit.recorder import record
from stabilitykit.records import Record
from stabilitykit.records.bounds import Largest
from stabilitykit.run.case import Progress

_ROWS = 4
"""Rows of each matrix, those with the largest bounds, for which states are made."""

_ASCENT = 60
_DISTANCES = tuple(sorted({round(2 ** (step / 4)) for step in range(69)}))
"""Distances from a query to its key that are tried [tokens], 1 to 131,072, within the context and the window.

RoPE rotates each pair of channels by the distance times its frequency, so that at some of them two channels align."""


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states of one layer: `attention` [n, E] enter its input norm, `mlp` [n, E] the norm before its MLP.

    `pairs` are two states [2, E] each, the key's first, and the distance of their tokens.
    """

    attention: Tensor
    mlp: Tensor
    pairs: tuple[tuple[int, Tensor], ...]


def states_of(layer: LayerMatrices, config: GemmaConfig) -> States:
    """States that drive this layer's sites towards their bounds; float64, with a root mean square of one.

    `layer` has been bounded, so that the rows of `down_proj` with the largest bounds are refined.
    """
    gain = layer.gains["input_layernorm"]
    linear = [_along(layer[name] * gain) for name in ("q_proj", "k_proj", "v_proj")]
    o_END = layer["o_proj"].view(config.hidden_size, config.heads, config.head_dim)
    v_GDE = layer["v_proj"].view(config.kv_heads, config.head_dim, -1)
    groups = config.heads // config.kv_heads
    alone = sum(o_END[:, head] @ v_GDE[head // groups] for head in range(config.heads))  # one token attends to itself
    assert isinstance(alone, Tensor)
    attention = torch.cat([*linear, _along(alone * gain), _single(gain)])

    pre = layer.gains["pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"]
    gate, up = layer["gate_proj"] * pre, layer["up_proj"] * pre
    mlp = torch.cat([_along(gate), _along(up), _bisectors(gate, up), _ascend(layer, gate, up), _single(pre)])
    return States(attention=_unit(attention), mlp=_unit(mlp), pairs=tuple(_pairs(layer, config)))


def confirm(model: Gemma, states: Mapping[int, States], *, progress: Progress | None = None) -> dict[str, Largest]:
    """The largest magnitude at each site, and the state that led to it, when `model`'s own modules are run on these
    states, layer by layer; of the two states behind a score, the query's.

    Sites are the recorder's. The model is a float32 one: it computes the function that is bounded, without the rounding
    for which the bounds have margins.
    """
    found: dict[str, Largest] = {}
    for done, (index, mine) in enumerate(states.items()):
        if progress is not None:
            progress("confirming", done, len(states))
        # each state is its own sequence and attends to itself; then pairs, at their tokens' positions
        runs = [(mine.attention[:, None], (0,)), *((pair[None], (0, distance)) for distance, pair in mine.pairs)]
        attention = _Attention(model, index)
        with torch.inference_mode(), record(attention, formats=()) as recording:
            for state, positions in runs:
                attention(state.to(model.dtype), positions)
        for one in recording:
            _keep(found, one, runs[max(one.step, 0)][0])
        mlp = _MLP(model, index)
        with torch.inference_mode(), record(mlp, formats=()) as recording:
            mlp(mine.mlp.to(model.dtype)[None])
        for one in recording:
            _keep(found, one, mine.mlp[None])
    return found


def confirm_head(model: Gemma) -> dict[str, Largest]:
    """The same for the final norm and the logits."""
    gain = (1.0 + model.norm.weight.float()).double()
    parts = torch.split(model.lm_head.weight, 1 << 14)
    lengths = torch.cat([torch.linalg.vector_norm(part * gain, dim=1) for part in parts])
    best = model.lm_head.weight[lengths.topk(min(_ROWS, len(lengths)))[1]]
    state = _unit(torch.cat((best * gain * gain, _single(gain))))
    head = _Head(model)
    with torch.inference_mode(), record(head, formats=()) as recording:
        head(state.to(model.dtype)[None])
    found: dict[str, Largest] = {}
    for one in recording:
        _keep(found, one, state[None])
    return found


def _keep(found: dict[str, Largest], one: Record, given: Tensor) -> None:
    """`given` [B, T, E] are the states of the run that `one` was recorded in."""
    if one.amax is None or (one.site in found and found[one.site].value >= one.amax):
        return
    state = given[one.amax_row or 0, one.amax_position or 0]
    found[one.site] = Largest(one.amax, state=tuple(state.float().tolist()))


class _Attention(nn.Module):
    """The attention of one layer alone, under its path in the model."""

    def __init__(self, model: Gemma, index: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): model.layers[index]})
        self.rotary_emb = model.rotary_emb
        self.is_global = model.config.is_global(index)
        self.post_norms = model.config.post_norms

    def forward(self, state: Tensor, positions: tuple[int, ...]) -> None:
        """`state` [B, T, E] enters the input norm; its tokens stand at these T positions."""
        layer: Any = next(iter(self.layers.values()))
        dtype, device = state.dtype, state.device
        tables = [self.rotary_emb(self.is_global, one, one + 1, dtype=dtype, device=device) for one in positions]
        cos, sin = zip(*tables, strict=True)
        blocked = torch.full((len(positions),) * 2, torch.finfo(dtype).min, dtype=dtype, device=device)
        out = layer.self_attn(
            layer.input_layernorm(state),
            rope=(torch.cat(cos), torch.cat(sin)),
            mask=blocked.triu(1)[None, None],
            cache=None,
        )
        if self.post_norms:
            layer.post_attention_layernorm(out)


class _MLP(nn.Module):
    """The MLP of one layer alone, under its path in the model."""

    def __init__(self, model: Gemma, index: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): model.layers[index]})
        self.post_norms = model.config.post_norms

    def forward(self, state: Tensor) -> None:
        """`state` [B, T, E] enters the norm before the MLP."""
        layer: Any = next(iter(self.layers.values()))
        pre = layer.pre_feedforward_layernorm if self.post_norms else layer.post_attention_layernorm
        out = layer.mlp(pre(state))
        if self.post_norms:
            layer.post_feedforward_layernorm(out)


class _Head(nn.Module):
    def __init__(self, model: Gemma) -> None:
        super().__init__()
        self.norm, self.lm_head = model.norm, model.lm_head

    def forward(self, state: Tensor) -> None:
        self.lm_head(self.norm(state))


def stored_in(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """`checkpoint` with its weights rounded to `dtype`, in float32: the function whose tensors are bounded."""
    tensors = checkpoint.tensors
    return replace(checkpoint, tensors=LazyTensors(tensors, lambda name: tensors[name].to(dtype).float()))


def _unit(states: Tensor) -> Tensor:
    return states / states.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)


def _along(rows: Tensor) -> Tensor:
    """n along row ∘ g maximises row · (g ∘ n); `rows` include the gain."""
    return _unit(rows[_largest(torch.linalg.vector_norm(rows, dim=1))])


def _single(gain: Tensor) -> Tensor:
    """Only the channel with the largest gain."""
    return F.one_hot(gain.abs().argmax(), len(gain)).double()[None]


def _bisectors(gate: Tensor, up: Tensor) -> Tensor:
    """Halfway between a and ±b, on the side where a · n is positive and gelu passes it."""
    a, b = F.normalize(gate, dim=1), F.normalize(up, dim=1)
    lengths = torch.linalg.vector_norm(gate, dim=1) * torch.linalg.vector_norm(up, dim=1)
    cosine = (a * b).sum(1)
    best = _largest(lengths * (1 + cosine.abs()))
    return _unit(a[best] + torch.where(cosine[best] < 0, -1.0, 1.0)[:, None] * b[best])


def _ascend(layer: LayerMatrices, gate: Tensor, up: Tensor) -> Tensor:
    """For the rows of `down_proj` with the largest bounds: n ← ∇y / ||∇y||, from leading eigenvectors and random n.

    For a function that grows with its argument each such step on the sphere goes up, or nearly.
    """
    assert layer.down is not None
    rows, best = len(layer["down_proj"]), []
    gate32, up32 = gate.float(), up.float()
    generator = torch.Generator().manual_seed(layer.index)
    for index in list(layer.down.exact)[:_ROWS]:
        signed = layer["down_proj"][index % rows].float() * (1 if index < rows else -1)
        vectors = layer.down.exact[index].vectors.T.float()
        start = torch.cat((vectors, -vectors, torch.randn(8, gate.shape[1], generator=generator)))
        n = _unit(start)
        for _ in range(_ASCENT):
            n.requires_grad_(True)
            out = (F.gelu(n @ gate32.T, approximate="tanh") * (n @ up32.T)) @ signed
            (slope,) = torch.autograd.grad(out.sum(), n)
            n = _unit(slope)
        out = (F.gelu(n @ gate32.T, approximate="tanh") * (n @ up32.T)) @ signed
        best.append(n[out.argmax()].double())
    return torch.stack(best)


def _pairs(layer: LayerMatrices, config: GemmaConfig) -> Iterator[tuple[int, Tensor]]:
    """Distances [tokens], and states of a key and of a query that far behind it whose score is large."""
    base, scaling = config.rope_base_local, 1.0
    if config.is_global(layer.index):
        base, scaling = config.rope_base, config.rope_scaling
    frequencies = rope_frequencies(config.head_dim, base, scaling).double()
    gain = layer.gains["input_layernorm"]
    q_NDE = layer["q_proj"].view(config.heads, config.head_dim, -1) * gain
    k_GDE = layer["k_proj"].view(config.kv_heads, config.head_dim, -1) * gain
    distances = [one for one in _DISTANCES if one < min(config.context, config.window or config.context)]
    if config.query_key_norm:
        yield from _normed_pair(layer, q_NDE[0], k_GDE[0], frequencies, distances, config.rms_eps)
        return
    groups = config.heads // config.kv_heads
    for head in range(config.heads):
        for distance in distances[:3]:
            yield distance, _bare_pair(q_NDE[head], k_GDE[head // groups], frequencies * distance)


def _bare_pair(q: Tensor, k: Tensor, angles: Tensor) -> Tensor:
    """The leading singular pair of Q^T R^T K, of key and query: the largest score of any two states at these angles."""
    turned = _turn(q.T, angles).T
    x = torch.ones(q.shape[1], dtype=torch.float64)
    for _ in range(40):
        y = k.T @ (turned @ x)
        x = turned.T @ (k @ y)
        x = x / torch.linalg.vector_norm(x).clamp(min=1e-30)
    return _unit(torch.stack((k.T @ (turned @ x), x)))


def _normed_pair(
    layer: LayerMatrices, q: Tensor, k: Tensor, frequencies: Tensor, distances: list[int], eps: float
) -> Iterator[tuple[int, Tensor]]:
    """q and k along the two channels whose gains, rotated by the distance, have the largest product.

    All query heads share the norm; the first is used.
    """
    g, h = (layer.gains[f"self_attn.{part}_norm"] for part in "qk")
    half = len(g) // 2
    best = (0.0, 0, 0, 0)
    for distance in distances:
        cos, sin = (frequencies * distance).cos().abs(), (frequencies * distance).sin().abs()
        for other, table in ((0, cos), (half, sin)):
            value = g.abs() * h.roll(other).abs() * table.repeat(2)
            channel = int(value.argmax())
            best = max(best, (float(value[channel]), distance, channel, (channel + other) % len(g)))
    _, distance, of_q, of_k = best
    if distance:
        yield distance, torch.stack((_aimed(k, of_k, eps), _aimed(q, of_q, eps)))


def _aimed(rows: Tensor, channel: int, eps: float) -> Tensor:
    """A state n for which rows · n lies along one channel and is large after an RMSNorm with this eps.

    Least squares hit the channel exactly but may leave it so small that eps matters, so ridges are tried too.
    """
    gram = rows @ rows.T
    unit = torch.eye(len(rows), dtype=torch.float64)
    scale = torch.linalg.matrix_norm(gram)
    states = [
        _unit(rows.T @ torch.linalg.solve(gram + ridge * scale * unit, unit[channel]))
        for ridge in (1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    ]

    def reached(state: Tensor) -> float:
        made = rows @ state
        return float(made[channel].abs() * torch.rsqrt(made.square().mean() + eps))

    return max(states, key=reached)


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE of vectors [..., D] by angles [D / 2]."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _largest(values: Tensor) -> Tensor:
    return values.topk(min(_ROWS, len(values)))[1]
