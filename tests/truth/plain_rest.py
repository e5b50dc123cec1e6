"""Labels, interference, and the small print: numbers, names and formats in what is said."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from truth.decoders import AT, IDS, forward, here
from truth.models import decoder
from truth.plain import BFLOAT, INF, NAN, SINGLE, Lines, broke, counting, full, lines, rows, source
from truth.plain_origins import PART
from truth.plants import answer
from truth.row import Planted, Row

X = counting()
W = {"w": torch.ones(4)}


# Labels: models of a known family whose code is not the family's


class ScaledGate(nn.Module):
    """An MLP that scales its activated gate before it is multiplied: its first product is not gate · up."""

    def __init__(self, old: Any, scale: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            old.gate_proj,
            old.up_proj,
            old.down_proj,
            old.act_fn,
        )
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.scale * self.up_proj(x))


def scaled_gate(name: str) -> Planted:
    model = decoder(name)
    answer(model, "model.layers.1.mlp.gate_proj", forward, {AT: 300.0})
    model.model.layers[1].mlp = ScaledGate(model.model.layers[1].mlp, 300.0)
    model.half()
    return Planted(
        model=model, run=forward,
        expected=broke("layers.1.mlp/mul.0", "mul", "overflow", value=90000.0, channel=0, step=0,
                       label="^(?!.*gate · up)", **here()),
    )  # fmt: skip


def late_cast(name: str) -> Planted:
    """An attention that casts its values, not its probabilities, where the family casts the probabilities."""
    model = decoder(name)
    attention = model.model.layers[1].self_attn
    answer(model, "model.layers.1.self_attn.v_proj", forward, {AT: 40000.0})
    attention.v_proj = Doubled(attention.v_proj)
    model.half()
    return Planted(
        model=model, run=forward,
        expected=broke("layers.1.self_attn.v_proj", "cast", "overflow", value=80000.0, step=0, channel=0,
                       label="^(?!.*probabilities)", **here()),
    )  # fmt: skip


class Doubled(nn.Module):
    """A projection that is doubled in float32 and rounded back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x).float() * 2).to(x.dtype)


def rounded_query(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **rest: Any
) -> Any:
    """Attention in which the first cast is the keys', times 300."""
    key = (key.float() * 300).to(query.dtype).repeat_interleave(module.num_key_value_groups, 1)
    value = value.repeat_interleave(module.num_key_value_groups, 1)
    weights = query @ key.mT * (scaling / 300)
    if mask is not None:
        weights = weights + mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def own_attention(name: str) -> Planted:
    transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.register("truth", rounded_query)
    transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register("truth", transformers.masking_utils.eager_mask)
    model = decoder(name)
    answer(model, "model.layers.1.self_attn.k_proj", forward, {0: 300.0})
    model.config._attn_implementation = "truth"
    model.half()
    return Planted(
        model=model, run=forward,
        expected=broke("layers.1.self_attn/cast.0", "cast", "overflow", value=90000.0, step=0, row=0, position=0,
                       token=int(IDS[0, 0]), label="^(?!.*probabilities)"),
    )  # fmt: skip


class SquareFirst(nn.Module):
    """A norm whose first power is a cube, and whose squares come later."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.weight = old.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + x.pow(3) * 0.001
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def cubed(name: str) -> Planted:
    model = decoder(name)
    answer(model, "model.layers.0.mlp.down_proj", forward, {AT: 50.0})
    model.model.layers[1].input_layernorm = SquareFirst(model.model.layers[1].input_layernorm)
    model.half()
    return Planted(
        model=model, run=forward,
        expected=broke("layers.1.input_layernorm/pow.0", "pow", "overflow", step=0,
            label="^(?!.*squares)", outcome="reached", **here()),
    )  # fmt: skip


# Interference: code that a recorder has disturbed


@torch.library.custom_op("truth::noisy", mutates_args=())
def noisy(x: Tensor) -> Tensor:
    return x * 6e4 + torch.rand_like(x)


def drawn(m: Any, x: Tensor) -> Any:
    """What is drawn afterwards is returned, so that it is compared."""
    return noisy(x * m.w), torch.rand(3)


def encoder(damage: bool, dtype: torch.dtype = SINGLE) -> Planted:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().to(dtype).requires_grad_(False)
    x, padding = torch.randn(2, 7, 32).to(dtype), torch.zeros(2, 7).bool()
    padding[0, 5:] = True
    if damage:
        model.layers[1].linear1.weight[3, 4] = NAN
    expected = broke(
        ("layers.1*",), (), "weight", origin=source("weight", "layers.1.linear1.weight", False), says=("linear1",),
        outcome="reached",
    )  # fmt: skip
    return Planted(model=model, run=lambda m: m(x, src_key_padding_mask=padding), expected=expected if damage else None)


def resized(mode: str) -> Planted:
    def code(m: Any, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x * m.w, size=(7, 7), mode=mode) * 1000

    return lines(
        code, full(100.0, 1, 2, 4, 4), parameters={"w": torch.ones(4)}, dtype=SINGLE,
        expected=None,
    )  # fmt: skip


def recurrent(damage: bool) -> Planted:
    torch.manual_seed(0)
    model = nn.GRU(8, 8).eval().requires_grad_(False)
    x = torch.randn(5, 2, 8)
    if damage:
        model.weight_hh_l0[3, 4] = INF
    expected = broke(
        ("/*",), (), "weight", origin=source("weight", "weight_hh_l0", False), says=("weight_hh_l0",), outcome="reached"
    )
    return Planted(model=model, run=lambda m: m(x)[0], expected=expected if damage else None)


def scripted(damage: bool) -> Planted:
    def modules() -> dict[str, nn.Module]:
        return {"part": nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4))}

    expected = broke("/mul.0", "mul", "overflow", outcome="reached", value=None)
    return lines(
        lambda m, x: m.part(x) * (1e38 if damage else 1) * 10, full(10.0), modules=modules, dtype=SINGLE,
        expected=expected if damage else None,
    )  # fmt: skip


def complex_numbers(m: Any, x: Tensor) -> Tensor:
    return torch.fft.rfft((x * m.w).float()).abs().to(x.dtype) - 1


def functional(m: Any, x: Tensor) -> Tensor:
    weights = {"weight": m.part.weight * 30000, "bias": m.part.bias}
    return torch.func.functional_call(m.part, weights, (x,))


def mapped(m: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row * m.w * 60000 - 1)(x)


class Raises(nn.Module):
    """The user's own error is the user's."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 60000
        raise ValueError(f"the model's own: {float(y.amax())}")


def raised() -> Planted:
    x = full(2.0).half()

    def symptom(result: Any) -> None:
        assert result is None

    return Planted(
        model=Raises(), run=lambda m: m(x), symptom=symptom, raises=True,
        expected=broke("/mul.0", "mul", "overflow", value=120000.0, outcome=None),
    )  # fmt: skip


def read_only_input() -> Planted:
    """The user's tensor is written to by the model, as it is without a recorder."""
    x = full(2.0).half()

    def run(m: Any) -> Any:
        given = x.clone()
        out = m(given)
        return out, given

    return Planted(
        model=Lines(lambda m, y: y.mul_(m.w).mul_(60000) - 1, W, {}, dict).half(), run=run,
        expected=broke("/mul.1", "mul", "overflow", value=120000.0),
    )  # fmt: skip


# The small print


def said(code: Callable[..., Any], x: Tensor, value: float, *says: str, operator: str = "add", **rest: Any) -> Planted:
    """Sums that are printed have to hold."""
    return lines(
        code, x, wide=True, expected=broke(f"/{operator}.0", operator, "overflow", value=value, says=says, **rest),
    )  # fmt: skip


def no_parameters() -> Planted:
    """The dtype is that of the tensors, since there are no parameters."""
    return lines(lambda m, x: x * x - 1, full(300.0), wide=True, expected=broke(
        "/mul.0", "mul", "overflow", value=90000.0, says=("float16",),
            never=("float32 is", "float32 overflows")))  # fmt: skip


_OWN: tuple[tuple[str, Callable[[str], Planted], tuple[str, ...]], ...] = (
    ("a scaled gate", scaled_gate, ("llama", "gemma", "qwen2")),
    ("a projection that casts", late_cast, ("llama", "mistral")),
    ("an attention of the user's own", own_attention, ("llama", "qwen2")),
    ("a norm of the user's own", cubed, ("llama", "mistral")),
)

ROWS: tuple[Row, ...] = (
    *(Row(name=name, root=8, family=f, make=partial(plant, f)) for name, plant, families in _OWN for f in families),
    *rows(
        9,
        ("a custom operator that draws", lambda: lines(
            drawn, full(2.0), parameters=W, wide=None,
            expected=broke("/noisy.0", (), ("overflow", "unresolved"), never=("finite operands",)))),
        ("control, padding in torch's encoder", lambda: encoder(False)),
        ("padding in torch's encoder, NaN", lambda: encoder(True)),
        ("control, bilinear", lambda: resized("bilinear")),
        ("control, bicubic", lambda: resized("bicubic")),
        ("control, nearest", lambda: resized("nearest")),
        ("control, recurrent", lambda: recurrent(False)),
        ("recurrent, infinity", lambda: recurrent(True)),
        ("control, scripted", lambda: scripted(False)),
        ("scripted, overflow", lambda: scripted(True)),
        ("complex numbers", lambda: lines(
            complex_numbers, full(40000.0), parameters=W, wide=None,
            expected=broke("/cast.0", "cast", "overflow", value=160000.0))),
        ("mapped over rows", lambda: lines(
            mapped, full(2.0), parameters=W, expected=broke("/mul.1", "mul", "overflow", value=120000.0))),
        ("with other weights", lambda: lines(
            functional, full(8.0), modules=lambda: {"part": nn.Linear(4, 4)},
            expected=broke(("part",), "matmul", "overflow", origin=source(("computed",), (), True)))),
        ("an error of the model's own", raised),
        ("an input that is written to", read_only_input),
        ("control, no elements", lambda: lines(lambda m, x: x[:, :0] * m.w, X, parameters=W, expected=None)),
        ("control, no dimensions", lambda: lines(lambda m, x: (x * m.w).sum() * 1, X, parameters=W, expected=None)),
        ("control, integers alone", lambda: lines(lambda m, i: i * 2 + 1, torch.arange(6), parameters=W,
            expected=None)),
        ("control, what draws", lambda: lines(
            lambda m, x: (nn.functional.dropout(x * m.w, 0.5, True), torch.rand(3)), X, parameters=W, expected=None)),
    ),
    *rows(
        10,
        ("a number less a tensor", lambda: said(
            lambda m, x: 60000 - x, full(-60000.0), 120000.0, "120,000", operator="sub")),
        ("a sum with a factor", lambda: said(
            lambda m, x: torch.add(x, x, alpha=3), full(30000.0), 120000.0, "120,000")),
        ("a difference with a negative factor", lambda: said(
            lambda m, x: torch.sub(x, x, alpha=-3), full(30000.0), 120000.0, "120,000", operator="sub")),
        ("a quotient", lambda: said(
            lambda m, x: x / 1e-3, full(100.0), 100000.0, operator="div")),
        ("a product of two", lambda: said(
            lambda m, x: x * x, full(300.0), 90000.0, r"300 (·|×|\*) 300", operator="mul")),
        ("a fused product and sum", lambda: said(
            lambda m, x: torch.addcmul(x, x, x, value=2), full(200.0), 80200.0, operator="addcmul")),
        ("a linear blend", lambda: said(
            lambda m, x: torch.lerp(x, -x, 4.0), full(20000.0), -140000.0, operator="lerp")),
        ("no parameters", no_parameters),
        ("bfloat16", lambda: lines(
            lambda m, x: x * m.w * x, full(1e30), parameters=W, dtype=BFLOAT, wide=True,
            expected=broke("/mul.1", "mul", "overflow", value=1e60, says=("bfloat16",),
                never=(r"\bfloat16 overflows",)))),
        ("float64", lambda: lines(
            lambda m, x: x * m.w * x, full(1e200), parameters=W, dtype=torch.float64,
            expected=broke("/mul.1", "mul", "overflow", value=INF, never=("bfloat16, float32", "wider range")))),
        ("control, no parameters", lambda: lines(lambda m, x: x * 2, X, expected=None)),
        ("control, mean of large float64 numbers", lambda: lines(
            lambda m, x: x * 0.5, full(1.7e308), dtype=torch.float64, expected=None)),
        ("control, the largest number of float16", lambda: lines(
            lambda m, x: x * m.w, full(65504.0), parameters=W, expected=None)),
        ("control, subnormal numbers", lambda: lines(lambda m, x: x * m.w, full(1e-7), parameters=W, expected=None)),
        ("control, float8", lambda: lines(
            lambda m, x: (x * m.w).to(torch.float8_e4m3fn).to(x.dtype), X, parameters=W, expected=None)),
        ("control, a part with a norm", lambda: lines(PART, X, modules=lambda: {"part": nn.LayerNorm(4)},
            expected=None)),
    ),
)  # fmt: skip
