"""Faults of backward passes: the forward pass is finite, and a gradient is not, or is nothing.

Where a gradient breaks and how large it would be is known from hooks on the tensors of the same code in float64, or
from how the fault was planted.
"""

import math
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from truth.decoders import IDS
from truth.models import DECODERS, decoder
from truth.plain import BFLOAT, HALF, SINGLE
from truth.row import Expected, Origin, Planted, Row

GRADIENTS = {"backward": True}
SAMPLER = ("temperature", "greedy", "top_p")


class Middle(nn.Module):
    """Some lines of code between two layers."""

    def __init__(self, code: Callable[..., Tensor]) -> None:
        super().__init__()
        self.code = code

    def forward(self, h: Tensor) -> Tensor:
        return self.code(h)


class Net(nn.Module):
    """first → middle → last, which is frozen; both layers are multiples of the identity: all elements are alike."""

    def __init__(self, code: Callable[..., Tensor], first: float = 1.0, last: float = 1.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.middle = Middle(code)
        self.first.weight.data = first * torch.eye(4)
        self.last.weight.data = last * torch.eye(4)
        self.last.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.middle(self.first(x)))
        return y


def step(x: float | Tensor, scale: float, *, tokens: int = 2, dtype: torch.dtype = HALF) -> Callable[[Any], Tensor]:
    """A training step whose loss is the sum of what comes out, times `scale`."""
    given = torch.full((1, tokens, 4), x) if isinstance(x, float) else x

    def run(m: Any) -> Tensor:
        m.zero_grad()
        kind = next(m.parameters()).dtype
        y = m(given.to(kind) if given.is_floating_point() else given)
        (y.to(torch.promote_types(kind, SINGLE)).sum() * scale).backward()
        return y.detach().float()

    return run


def seen(model: nn.Module, run: Callable[[Any], Tensor], path: str) -> Tensor:
    """The gradient of what the module at `path` returns, by a hook on the tensor."""
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda grad: kept.append(grad.clone()))

    handle = model.get_submodule(path).register_forward_hook(hook)
    run(model)
    handle.remove()
    model.zero_grad()
    return kept[0]


def loses_gradients(model: nn.Module) -> Callable[[Any], None]:
    def symptom(result: Any) -> None:
        assert bool(result.isfinite().all())
        assert any(not bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)

    return symptom


def between(
    code: Callable[..., Tensor],
    operator: str | tuple[str, ...],
    kind: str = "overflow",
    *,
    x: float = 1.0,
    scale: float = 1.0,
    last: float = 1.0,
    site: str = "first",
    **more: Any,
) -> Planted:
    """The gradient of `site` is lost in the derivative of a line of `middle`; its float64 value comes from a hook."""
    model, run = Net(code, last=last).to(HALF), step(x, scale)
    wide = Net(code, last=last).double()
    grads = seen(wide, run, "first").flatten()
    grad = float(grads[grads.abs().argmax()])
    assert kind != "overflow" or abs(grad) > 65519, grad
    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=(f"backward/{site}", "backward/first"), kinds=(kind,), coarse=(kind, "unresolved"),
            operators=operator if isinstance(operator, tuple) else (operator,),
            says=("forward pass is finite", "gradient"), value=grad if kind == "overflow" else None, unsure=("value",),
            never=(*SAMPLER, "finite throughout"), wider=True, **more,
        ),
    )  # fmt: skip


def root_mean_square(h: Tensor) -> Tensor:
    wide = h.float() if h.dtype == HALF else h
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-9)
    return normal.to(h.dtype) * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=h.dtype)


def uneven(h: Tensor) -> Tensor:
    return functional.log_softmax(h, -1) * torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=h.dtype)


def at_head(kind: torch.dtype = HALF, scale: float = 1e5) -> Planted:
    """A loss scale that the gradient of the last layer does not hold."""
    model, run = Net(lambda h: h).to(kind), step(1.0, scale)
    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=("backward/last",), operators=("cast",), kinds=("overflow",), value=scale,
            says=("forward pass is finite", r"loss scale", "smaller loss scale"), never=SAMPLER, wider=True,
        ),
    )  # fmt: skip


def weight_only(bias: bool = False) -> Planted:
    """Every gradient on the way fits; the sum over tokens that a weight's gradient is does not."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=bias)
            self.first.weight.data = 0.01 * torch.eye(4)
            if bias:
                self.first.bias.data.zero_()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.first(x)
            return y

    model, run = Biased().to(HALF), step(1.0 if bias else 200.0, 1000.0, tokens=100)
    name = "bias" if bias else "weight"
    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=(f"backward/first.{name}",), kinds=("overflow",), coarse=("overflow", "unresolved"),
            value=100 * 1000.0 * (1.0 if bias else 200.0), unsure=("value",), says=(rf"first\.{name}",),
            never=SAMPLER, wider=True,
        ),
    )  # fmt: skip


def repeated_token() -> Planted:
    """An embedding's gradient is a sum over all places at which a token stands."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.embed(ids)
            return found

    model, run = Words().to(HALF), step(torch.tensor([[3, 3, 3, 5]]), 30000.0)
    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=("backward/embed.weight",), operators=("embedding",), kinds=("overflow",), value=90000.0,
            coarse=("overflow", "unresolved"), says=("embed",), never=SAMPLER, wider=True,
        ),
    )  # fmt: skip


def accumulated(before: float) -> Planted:
    """A weight's gradient from earlier: infinite, or too large to add to."""
    model = Net(lambda h: h).to(HALF)

    def run(m: Any) -> Tensor:
        m.zero_grad()
        m.first.weight.grad = torch.full_like(m.first.weight, before)
        y = m(torch.ones(1, 1, 4, dtype=HALF))
        (y.float().sum() * 40000).backward()
        return y.detach()

    infinite = math.isinf(before)
    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=("backward/first.weight",),
            kinds=("input",) if infinite else ("overflow",), value=None if infinite else before + 40000,
            unsure=("value",),
            origin=Origin(kinds=("outside",), names=("first.weight.grad",), finite=False) if infinite else None,
            says=("before this backward pass", "zero") if infinite else ("exceeds",), never=SAMPLER, wider=True,
        ),
    )  # fmt: skip


def given_infinity() -> Planted:
    """The gradient that the caller passes to backward() is infinite."""
    model = Net(lambda h: h).to(HALF)

    def run(m: Any) -> Tensor:
        m.zero_grad()
        y = m(torch.ones(1, 2, 4, dtype=HALF))
        y.backward(torch.full_like(y, math.inf))
        return y.detach()

    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=("backward/last",), kinds=("input",), says=("backward()",),
            origin=Origin(kinds=("outside",), finite=False), never=SAMPLER,
        ),
    )  # fmt: skip


def ignored_labels() -> Planted:
    model = Net(lambda h: h)

    def run(m: Any) -> Tensor:
        m.zero_grad()
        y = m(torch.ones(1, 2, 4)).flatten(0, 1)
        loss = functional.cross_entropy(y, torch.full((2,), -100))
        loss.backward()
        return loss.detach().reshape(1)

    return Planted(
        model=model, run=run, grad=True, record=GRADIENTS,
        expected=Expected(
            sites=("outside/*",), kinds=("invalid",), coarse=("invalid", "unresolved", "input"),
            says=("label",), never=SAMPLER,
        ),
    )  # fmt: skip


def faint(scale: float, kind: torch.dtype = HALF) -> Planted:
    """All gradients are below the least number of float16."""
    model, run = Net(lambda h: h).to(kind), step(1.0, scale)

    def symptom(result: Tensor) -> None:
        assert all(not p.grad.half().any() for p in model.parameters() if p.grad is not None)

    return Planted(
        model=model,
        run=run,
        symptom=symptom,
        grad=True,
        record=GRADIENTS,
        expected=Expected(sites=(), says=("too small for float16", r"first\.weight"), never=("overflows",)),
    )


def optimised(what: str) -> Planted:
    """Gradients are finite; what is done with them is not."""
    model = Net(lambda h: h).to(HALF)
    start = {name: held.clone() for name, held in model.state_dict().items()}
    scale = {"eps": 1e-3, "unscaled": 1000.0, "clipped": 60000.0}[what]

    def run(m: Any) -> Tensor:
        m.load_state_dict(start)
        m.zero_grad()
        y = m(torch.ones(1, 1, 4, dtype=HALF))
        (y.float().sum() * scale).backward()
        if what == "unscaled":
            for held in m.parameters():
                if held.grad is not None:
                    held.grad = held.grad * scale  # instead of a division
            return m.first.weight.grad
        if what == "clipped":
            found: Tensor = nn.utils.clip_grad_norm_(m.parameters(), 1.0, foreach=False)
            return found.reshape(1)
        torch.optim.Adam(m.parameters(), lr=1e-3, foreach=False).step()
        return m.first.weight.detach().clone()

    def symptom(result: Tensor) -> None:
        assert not bool(result.isfinite().all())

    return Planted(
        model=model, run=run, symptom=symptom, grad=True, record=GRADIENTS,
        expected=Expected(
            sites=("outside*", "*weight*"), kinds=("overflow", "invalid", "division-by-zero", "reduction"),
            coarse=("overflow", "invalid", "division-by-zero", "unresolved", "input", "weight"),
            never=(*SAMPLER, "the gradient of"), wider=True,
        ),
    )  # fmt: skip


class Detour(nn.Module):
    """A layer, and its result times 2^-k and 2^k: nothing to the forward pass, and 2^k to a gradient on its way."""

    def __init__(self, inner: nn.Module, power: int) -> None:
        super().__init__()
        self.inner, self.power = inner, power

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.inner(x) * 2.0**-self.power) * 2.0**self.power
        return y


def loss_of(m: Any) -> Tensor:
    loss: Tensor = m(input_ids=IDS, labels=IDS).loss
    return loss


def trained(scale: float) -> Callable[[Any], Tensor]:
    def run(m: Any) -> Tensor:
        m.zero_grad()
        loss = loss_of(m)
        (loss * scale).backward()
        return loss.detach().reshape(1)

    return run


def detour(name: str, path: str) -> Planted:
    """In float16 a gradient overflows between the two products after one module, and nowhere before."""
    model: Any = decoder(name).requires_grad_()
    part, _, leaf = path.rpartition(".")
    run = trained(16.0)
    largest = float(seen(model, run, path).abs().max())
    power = math.ceil(math.log2(70000 / largest)) + 1
    setattr(model.get_submodule(part), leaf, Detour(model.get_submodule(path), power))
    model.half()
    model.requires_grad_()
    short = path.removeprefix("model.")
    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=(f"backward/{short}/mul.0", f"backward/{short}.inner*"), operators=("mul",), kinds=("overflow",),
            coarse=("overflow", "unresolved"), says=("forward pass is finite", r"loss scale 2\^4"),
            never=(*SAMPLER, "finite throughout"), wider=True,
        ),
    )  # fmt: skip


def first_lost(model: nn.Module, run: Callable[[Any], Any]) -> str:
    """The first module whose output's gradient is not finite, or parameter, by plain hooks, in autograd's order."""
    lost: list[str] = []
    handles: list[Any] = []

    def look(name: str, grad: Tensor) -> None:
        if not bool(grad.isfinite().all()):
            lost.append(name)

    def hook(name: str) -> Callable[..., None]:
        def forward(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda grad: look(name, grad))

        return forward

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(hook(name)))
    for name, held in model.named_parameters():
        if held.requires_grad:
            handles.append(held.register_hook(lambda grad, name=name: look(name, grad)))
    run(model)
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return lost[0]


def overscaled(name: str, scale: float, **how: Any) -> Planted:
    """A loss scale that some gradient of a decoder does not hold; hooks say which is the first."""
    model: Any = decoder(name, **how).half().requires_grad_()
    run = trained(scale)
    first = first_lost(model, run).removeprefix("model.")
    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=(f"backward/{first}",), kinds=("overflow",), coarse=("overflow", "unresolved"),
            says=("forward pass is finite", "loss scale", "weight gradient"), never=(*SAMPLER, "finite throughout"),
            wider=True,
        ),
    )  # fmt: skip


def checkpointed(name: str, scale: float, *, reentrant: bool) -> Planted:
    model: Any = decoder(name).half().requires_grad_().train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    run = trained(scale)
    first = first_lost(decoder(name).half().requires_grad_(), run).removeprefix("model.")
    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=(f"backward/{first}",), kinds=("overflow",), coarse=("overflow", "unresolved"),
            says=("forward pass is finite", "loss scale"), never=(*SAMPLER, "finite throughout"), wider=True,
        ),
    )  # fmt: skip


def inside_checkpoint(*, reentrant: bool) -> Planted:
    """What breaks inside a checkpoint, where autograd's operands were thrown away and made anew."""

    class Kept(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y: Tensor = self.last(checkpoint(self.middle, h, use_reentrant=reentrant))
            return y

    def code(h: Tensor) -> Tensor:
        return h * 300

    model, run = Kept(code).to(HALF), step(1.0, 300.0)
    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=("backward/first",), kinds=("overflow", "unresolved"), coarse=("overflow", "unresolved"),
            says=("gradient of first",), never=SAMPLER, wider=True,
        ),
    )  # fmt: skip


def adapted(scale: float) -> Planted:
    """Only the adapter's weights have gradients."""
    model: Any = decoder("llama")
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).half().train()
    for held in model.parameters():
        held.requires_grad_(held.requires_grad)
    run = trained(scale)
    first = first_lost(model, run).removeprefix("base_model.model.").removeprefix("model.")
    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=(f"backward/{first}",), kinds=("overflow",), coarse=("overflow", "unresolved"),
            says=("forward pass is finite",), never=SAMPLER, wider=True,
        ),
    )  # fmt: skip


def scaler_used(name: str, scale: float) -> Planted:
    """As people train: autocast, a GradScaler with too large a scale."""
    model: Any = decoder(name).requires_grad_()

    def run(m: Any) -> Tensor:
        m.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", dtype=HALF):
            loss = loss_of(m)
        scaler.scale(loss).backward()
        return loss.detach().reshape(1)

    first = first_lost(model, run).removeprefix("model.")
    return Planted(
        model=model, run=run, symptom=loses_gradients(model), grad=True, record=GRADIENTS,
        expected=Expected(
            sites=(f"backward/{first}", f"backward/{first}/*"), kinds=("overflow",), coarse=("overflow", "unresolved"),
            says=("GradScaler", r"2\^"), never=SAMPLER, wider=True,
        ),
    )  # fmt: skip


def healthy(
    kind: torch.dtype, code: Callable[..., Tensor] = lambda h: h, x: float = 1.0, scale: float = 1.0
) -> Planted:
    """Nothing is wrong with any gradient."""
    model, run = Net(code).to(kind), step(x, scale)

    def symptom(result: Tensor) -> None:
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)

    return Planted(model=model, run=run, symptom=symptom, expected=None, grad=True, record=GRADIENTS)


def well_trained(name: str, scale: float, kind: torch.dtype = HALF) -> Planted:
    model: Any = decoder(name).to(kind).requires_grad_()
    run = trained(scale)

    def symptom(result: Tensor) -> None:
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)

    return Planted(model=model, run=run, symptom=symptom, expected=None, grad=True, record=GRADIENTS)


def row(
    name: str, plant: Callable[..., Planted], *args: Any, family: str = "backward", root: int = 7, **how: Any
) -> Row:
    return Row(name=name, root=root, family=family, make=lambda: plant(*args, **how))


# The lines between two layers, whose derivative it is, what kind of break, and the step's input and loss scale.
BETWEEN: dict[str, tuple[Any, ...]] = {
    "product with a constant": (lambda h: h * 300, "mul", {"scale": 300.0}),
    "square": (lambda h: h.square(), ("pow", "square"), {"x": 200.0, "scale": 200.0}),
    "quotient": (lambda h: h / 2.0**-9, "div", {"scale": 200.0}),
    "exp, finite forward": (lambda h: h.exp(), "exp", {"x": 11.0, "scale": 4.0}),
    "reciprocal": (lambda h: h.reciprocal(), "reciprocal", {"x": 0.01, "scale": 10.0}),
    "divided by": (lambda h: 1 / h, ("reciprocal", "div"), {"x": 0.0078125, "scale": 10.0}),
    "log": (lambda h: h.log(), "log", {"x": 1e-4, "scale": 10.0}),
    "sqrt of a small number": (lambda h: h.sqrt(), "sqrt", {"x": 6e-8, "scale": 60.0}),
    "rsqrt": (lambda h: h.rsqrt(), "rsqrt", {"x": 1e-3, "scale": 10.0}),
    "silu": (functional.silu, "silu", {"x": 2.4, "scale": 60000.0}),
    "gelu": (functional.gelu, "gelu", {"x": 1.4142, "scale": 60000.0}),
    "log-softmax": (uneven, "log_softmax", {"scale": 60000.0}),
    "norm of a small vector": (root_mean_square, "cast", {"x": 0.0078125, "scale": 2000.0}),
    "three uses": (lambda h: h.expand(3, 1, 2, 4).sum(0), "expand", {"scale": 30000.0}),
    "two uses": (lambda h: h * 1 + h * 1, "add", {"scale": 40000.0}),
    "cumulative sum": (lambda h: h.cumsum(-1), ("cumsum", "flip", "add"), {"scale": 30000.0}),
    "sqrt at zero": (lambda h: h.sqrt(), "sqrt", "division-by-zero", {"x": 0.0}),
    "sqrt at zero behind a where": (
        lambda h: torch.where(h > 0, h.sqrt(), h * 0), "sqrt", "invalid", {"x": 0.0},
    ),
    "norm by hand at zero": (
        lambda h: h + h.square().sum(-1, keepdim=True).sqrt(), "sqrt", "division-by-zero",
        {"x": 0.0, "site": "middle/sum.0"},
    ),
    "acos at one": (lambda h: h.acos(), "acos", "division-by-zero", {"x": 1.0}),
    "power of a half at zero": (lambda h: h**0.5, ("pow", "sqrt"), "division-by-zero", {"x": 0.0}),
}  # fmt: skip

DOWN, OUTPUT, QUERY = (DECODERS["llama"].parts.down.format(0), DECODERS["llama"].parts.output.format(1),
    "model.layers.1.self_attn.q_proj")  # fmt: skip

ROWS: tuple[Row, ...] = (
    row("loss scale at the head", at_head),
    row("loss scale, weight's sum over tokens", weight_only),
    row("loss scale, bias's sum over tokens", weight_only, True),
    *(row(name, between, *code, **how) for name, (*code, how) in BETWEEN.items()),
    row("an embedding's repeated token", repeated_token),
    row("infinite from before", accumulated, math.inf),
    row("too large from before", accumulated, 40000.0),
    row("infinite gradient passed in", given_infinity),
    row("every label ignored", ignored_labels),
    row("underflow", faint, 1e-9),
    row("eps of Adam", optimised, "eps"),
    row("multiplied instead of divided by the scale", optimised, "unscaled"),
    row("clipping by an infinite norm", optimised, "clipped"),
    row("detour after down_proj", detour, "llama", DOWN, family="llama"),
    row("detour after o_proj", detour, "qwen2", OUTPUT, family="qwen2"),
    row("detour after q_proj", detour, "llama", QUERY, family="llama"),
    row("detour after a norm", detour, "mistral", "model.layers.0.input_layernorm", family="mistral"),
    row("detour after the embedding", detour, "qwen3", "model.embed_tokens", family="qwen3"),
    *(row("loss scale too large", overscaled, name, 2.0**20, family=name)
        for name in ("llama", "qwen2", "mistral", "gemma", "phi", "qwen3")),
    row("loss scale, checkpointed", checkpointed, "llama", 2.0**20, reentrant=False, family="llama"),
    row("loss scale, checkpointed, reentrant", checkpointed, "llama", 2.0**20, reentrant=True, family="llama"),
    row("inside a checkpoint", inside_checkpoint, reentrant=False),
    row("inside a checkpoint, reentrant", inside_checkpoint, reentrant=True),
    row("adapter", adapted, 2.0**20, family="llama"),
    *(row("GradScaler and autocast", scaler_used, name, 2.0**22, family=name) for name in ("llama", "qwen2")),
    row("control, bfloat16", healthy, BFLOAT, scale=1e5),
    row("control, float32", healthy, SINGLE, scale=1e5),
    row("control, float16", healthy, HALF, scale=1024.0),
    row("control, norm at zero", healthy, HALF, lambda h: h + torch.linalg.vector_norm(h, dim=-1, keepdim=True), 0.0),
    row("control, angle at the origin", healthy, HALF, lambda h: torch.atan2(h, h), 0.0),
    row("control, spread of equal numbers", healthy, SINGLE, lambda h: h + h.std(-1, keepdim=True), 1.0),
    row("control, loss scale that fits", well_trained, "llama", 1024.0, family="llama"),
    row("control, loss scale that fits", well_trained, "qwen2", 1024.0, family="qwen2"),
    row("control, the same scale in bfloat16", well_trained, "llama", 2.0**20, BFLOAT, family="llama"),
    row("control, the same scale in float32", well_trained, "llama", 2.0**20, SINGLE, family="llama"),
)  # fmt: skip
