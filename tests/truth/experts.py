"""Mixtures of experts and state-space models: rows in another order, and one position after the other."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truth.decoders import AT, IDS, forward, here
from truth.models import decoder, mamba, new
from truth.plants import answer, lost_places, only_at
from truth.row import Expected, Origin, Planted, Row

EXPERTS = "model.layers.1.mlp.experts"
SITE = "layers.1.mlp.experts"
PLACE = ("row", "rows", "position", "positions", "token")  # experts take tokens in an order of their own


def routed(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the experts of the second layer are given: tokens [L, D], and their experts and weights [L, K]."""
    seen: list[Any] = []
    hook = model.get_submodule(EXPERTS).register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        forward(model)
    hook.remove()
    tokens, chosen, weights = seen[0]
    return tokens.double(), chosen, weights.double()


def hidden_of(model: Any, expert: int, tokens: Tensor) -> Tensor:
    """act(gate) · up of one expert, in float64."""
    gate, up = F.linear(tokens, model.get_submodule(EXPERTS).gate_up_proj[expert].double()).chunk(2, -1)
    return F.silu(gate) * up


def set_output(model: Any, expert: int, at: int, value: float, channel: int = 0) -> None:
    """Makes one expert's output be `value` in a channel for the token at one position, and 0 for all others."""
    tokens, _, _ = routed(model)
    x = hidden_of(model, expert, tokens)
    target = torch.zeros(len(x), dtype=torch.float64)
    target[at] = value
    row = torch.linalg.lstsq(x, target[:, None], driver="gelsd").solution[:, 0]
    model.get_submodule(EXPERTS).down_proj.data[expert, channel] = row.float()


def expert_output(name: str, **how: Any) -> Planted:
    """One expert's output before its routing weight, with which it would fit."""
    model = decoder(name, **how)
    _, chosen, weights = routed(model)
    place = int(weights[AT].argmin())
    expert, weight = int(chosen[AT, place]), float(weights[AT, place])
    value = 70000.0 if weight < 0.9 else 80000.0
    set_output(model, expert, AT, value)
    scaled = value * weight
    model.half()
    return Planted(
        model=model, run=forward,
        symptom=lambda result: only_at(lost_places(model, "model.layers.1.mlp", forward), AT, 0),
        expected=Expected(
            sites=(f"{SITE}/matmul.*", f"{SITE}/*mm*", f"{SITE}*"), kinds=("overflow",), step=0, value=value,
            scaled=None if scaled > 60000 else scaled, outcome="reached", unsure=PLACE, channel=0,
            says=("expert",), never=("starts with",), residual=True, **here(),
        ),
    )  # fmt: skip


def expert_product(name: str) -> Planted:
    """gate · up of one expert."""
    model = decoder(name)
    tokens, chosen, _ = routed(model)
    expert = int(chosen[AT, 0])
    experts = model.get_submodule(EXPERTS)
    half = experts.gate_up_proj.shape[1] // 2
    target = torch.zeros(len(tokens), dtype=torch.float64)
    target[AT] = 300.0
    row = torch.linalg.lstsq(tokens, target[:, None], driver="gelsd").solution[:, 0].float()
    experts.gate_up_proj.data[expert, 0] = row
    experts.gate_up_proj.data[expert, half] = row
    model.half()
    return Planted(
        model=model, run=forward,
        symptom=lambda result: only_at(lost_places(model, "model.layers.1.mlp", forward), AT),
        expected=Expected(
            sites=(f"{SITE}/mul.*",), operators=("mul",), kinds=("overflow",), step=0, value=90000.0, channel=0,
            outcome="reached", unsure=PLACE, never=("starts with",), **here(),
        ),
    )  # fmt: skip


def experts_sum(name: str) -> Planted:
    """The stream and two experts' outputs, each of which fits; the sum of all does not."""
    model = decoder(name)
    layer = "model.layers.1"
    answer(model, f"{layer}.self_attn.o_proj", forward, {AT: 40000.0}, channel=2)
    _, chosen, weights = routed(model)
    for place in (0, 1):
        set_output(model, int(chosen[AT, place]), AT, min(60000.0, 20000.0 / float(weights[AT, place])), channel=2)
    total = 40000.0 + sum(min(20000.0, 60000.0 * float(weights[AT, place])) for place in (0, 1))
    model.half()
    return Planted(
        model=model, run=forward,
        symptom=lambda result: only_at(lost_places(model, layer, forward), AT, 2),
        expected=Expected(
            sites=("layers.1",), operators=("add",), kinds=("overflow",), step=0, channel=2, value=total,
            outcome="reached", residual=True, **here(),
        ),
    )  # fmt: skip


def expert_weight(name: str) -> Planted:
    """NaN in one expert's weights: only tokens that are sent to it are lost."""
    model = decoder(name)
    _, chosen, _ = routed(model)
    expert = int(chosen[AT, 0])
    lost = tuple(int(i) for i in (chosen == expert).any(-1).nonzero().flatten())
    model.get_submodule(EXPERTS).down_proj.data[expert, 3, 4] = math.nan
    model.half()
    return Planted(
        model=model, run=forward,
        symptom=lambda result: same(sorted({p[1] for p in lost_places(model, "model.layers.1.mlp", forward)}), lost),
        expected=Expected(
            sites=(f"{SITE}/*", SITE), kinds=("weight",), step=0, outcome="reached", position=lost[0], positions=lost,
            origin=Origin(kinds=("weight",), names=(f"{SITE}.down_proj",), finite=False), unsure=PLACE,
            says=("down_proj",), never=("starts with", "overflows in"),
        ),
    )  # fmt: skip


def same(found: list[int], wanted: tuple[int, ...]) -> None:
    assert tuple(found) == wanted, (found, wanted)


def router(name: str) -> Planted:
    """A router's logit past the maximum."""
    model = decoder(name)
    path = "model.layers.0.mlp.gate"
    x: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: x.append(args[0].double()))
    with torch.no_grad():
        forward(model)
    hook.remove()
    tokens = x[0].reshape(-1, x[0].shape[-1])
    target = torch.zeros(len(tokens), dtype=torch.float64)
    target[AT] = 80000.0
    row = torch.linalg.lstsq(tokens, target[:, None], driver="gelsd").solution[:, 0]
    model.get_submodule(path).weight.data[1] = row.float()
    model.half()
    return Planted(
        model=model, run=forward,
        expected=Expected(
            sites=("layers.0.mlp.gate/matmul.0", "layers.0.mlp.gate"), operators=("matmul",), kinds=("overflow",),
            step=0, value=80000.0, channel=1, outcome="reached", **here(),
        ),
    )  # fmt: skip


MIXER = "backbone.layers.1.mixer"


def mamba_linear(part: str, at: int = AT, channel: int = 0) -> Planted:
    model = new(mamba)
    path = f"{MIXER}.{part}"
    answer(model, path, forward, {at: 80000.0}, channel=channel)
    model.half()
    return Planted(
        model=model, run=forward, symptom=lambda result: only_at(lost_places(model, path, forward), at, channel),
        expected=Expected(
            sites=(path,), operators=("matmul",), kinds=("overflow",), step=0, value=80000.0, channel=channel,
            outcome="reached", **here(at),
        ),
    )  # fmt: skip


def mamba_decay() -> Planted:
    """exp(100) in float32: no format of 16 or 32 bits holds it."""
    model = new(mamba)
    model.get_submodule(MIXER).A_log.data[3, 2] = 100.0
    return Planted(
        model=model, run=forward,
        expected=Expected(
            sites=(f"{MIXER}/*exp.0",), operators=("exp",), kinds=("overflow",), step=0, value=math.exp(100),
            origin=Origin(kinds=("weight",), names=("*A_log",), finite=True),
            never=("use bfloat16", "starts with"),
        ),
    )  # fmt: skip


def mamba_step() -> Planted:
    """A fault in the second step, whose state the model keeps itself."""
    model = new(mamba)
    path = f"{MIXER}.in_proj"
    forced = torch.tensor([[77]])

    def run(m: Any) -> Tensor:
        first = m(IDS, use_cache=True)
        return m(forced, cache_params=first.cache_params, use_cache=True).logits

    answer(model, path, run, {IDS.shape[1]: 80000.0})
    model.half()
    return Planted(
        model=model, run=run,
        expected=Expected(
            sites=(path,), operators=("matmul",), kinds=("overflow",), step=1, value=80000.0, channel=0, row=0,
            token=77, position=IDS.shape[1], unsure=("position",), outcome="reached", never=("position 0", "token 0"),
        ),
    )  # fmt: skip


def mamba_weight(name: str, value: float) -> Planted:
    model = new(mamba)
    model.get_parameter(name).data.flatten()[3] = value
    model.half()
    return Planted(
        model=model, run=forward,
        expected=Expected(
            sites=(f"{name.rpartition('.')[0]}*", f"{MIXER}/convolution*"), kinds=("weight",), step=0,
                outcome="reached", says=(name.split(".")[-2],),
            origin=Origin(kinds=("weight",), names=(name,), finite=False),
                never=("overflows in", r"(?<!if not, )no number format helps"),
        ),
    )  # fmt: skip


class Recurrent(nn.Module):
    """A state that decays by exp(dt · A), position after position, and is kept between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 16)
        self.dt = nn.Linear(16, 16)
        self.decay = nn.Parameter(torch.full((16,), -1.0))
        self.lm_head = nn.Linear(16, 32)
        self.state: Tensor | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        state = torch.zeros(len(x), 16, dtype=x.dtype) if self.state is None else self.state
        found = []
        for t in range(x.shape[1]):
            state = torch.exp(self.dt(x[:, t]) * self.decay) * state + x[:, t]
            found.append(state)
        self.state = state
        return self.lm_head(torch.stack(found, 1))


def recurrent() -> Planted:
    model = new(Recurrent)
    model.embed_tokens.weight.data[7] = 0
    model.embed_tokens.weight.data[7, 0] = 1
    model.dt.weight.data[5, 0] = -100
    model.dt.bias.data[5] = 0

    def run(m: Any) -> Tensor:
        m.state = None
        m(torch.tensor([[3, 4, 5]]))
        return m(torch.tensor([[7]]))

    return Planted(
        model=model, run=run,
        expected=Expected(
            sites=("/exp.0",), operators=("exp",), kinds=("overflow",), step=1, value=math.exp(100), channel=5,
            token=7, position=3, unsure=("position", "token"), outcome="reached", says=(r"e\+?43",),
            never=("use bfloat16", "bfloat16, float32", "position 0", "token 0"),
        ),
    )  # fmt: skip


def row(name: str, root: int, family: str, plant: Callable[..., Planted], *args: Any, **how: Any) -> Row:
    return Row(name=name, root=root, family=family, make=lambda: plant(*args, **how))


MIXTURES = ("qwen3moe", "mixtral")

ROWS: tuple[Row, ...] = (
    *(row("output of an expert", 5, f, expert_output, f) for f in MIXTURES),
    *(row("output of an expert, batched", 6, f, expert_output, f,
        experts_implementation="batched_mm") for f in MIXTURES),
    *(row("output of an expert, grouped", 6, f, expert_output, f,
        experts_implementation="grouped_mm") for f in MIXTURES),
    *(row("one expert for each token", 6, f, expert_output, f, num_experts_per_tok=1) for f in MIXTURES),
    *(row("gate · up of an expert", 6, f, expert_product, f) for f in MIXTURES),
    *(row("stream and two experts", 6, f, experts_sum, f) for f in MIXTURES),
    *(row("NaN in an expert", 1, f, expert_weight, f) for f in MIXTURES),
    *(row("logit of the router", 5, f, router, f) for f in MIXTURES),
    row("input projection", 6, "mamba", mamba_linear, "in_proj"),
    row("output projection", 6, "mamba", mamba_linear, "out_proj", 4),
    row("projection of x", 8, "mamba", mamba_linear, "x_proj", 2),
    row("logarithm of the decay", 4, "mamba", mamba_decay),
    row("second step", 6, "mamba", mamba_step),
    row("NaN in a weight", 1, "mamba", mamba_weight, f"{MIXER}.out_proj.weight", math.nan),
    row("convolution past the maximum", 4, "mamba", mamba_weight, f"{MIXER}.conv1d.weight", 70000.0),

    row("gain past the maximum", 4, "mamba", mamba_weight, "backbone.layers.0.norm.weight", 70000.0),
    row("decay by hand", 4, "mamba", recurrent),
)  # fmt: skip
