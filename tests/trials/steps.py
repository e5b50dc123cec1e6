"""Training steps that fail, as a file's `make` would describe them, and what cures them when it is done by hand."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn
from truth.backward import BETWEEN, DOWN, OUTPUT, QUERY, Detour, Net, seen, trained
from truth.decoders import IDS
from truth.models import decoder

Make = Callable[[torch.dtype], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    make: Make
    loss_scale: float
    clip: float | None = None


@dataclass(slots=True)
class Hand:
    """The gradients of a step, divided by the loss scale in float64, and each weight before and after it."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def alike(self, wide: "Hand") -> bool:
        """Finite, and no gradient further from float32's than half of the largest of its weight."""
        for name, expected in wide.gradients.items():
            ours = self.gradients[name]
            if not bool(ours.isfinite().all()):
                return False
            largest = expected[expected.isfinite()].abs()
            if largest.numel() and float(largest.max()) and float((ours - expected).abs().max() / largest.max()) >= 0.5:
                return False
        return bool(wide.gradients)

    def steady(self, wide: "Hand") -> bool:
        """Weights are finite, and none moved more than twice as far as float32 moves any, apart from rounding."""
        farthest = max(float((after - before).abs().max()) for before, after in wide.weights.values())
        return all(
            bool(after.isfinite().all()) and _within(before, after, 2 * farthest)
            for before, after in self.weights.values()
        )

    def near(self, wide: "Hand") -> bool:
        return self.alike(wide) and self.steady(wide)

    @property
    def finite(self) -> bool:
        return all(bool(one.isfinite().all()) for one in self.gradients.values())


def _within(before: Tensor, after: Tensor, far: float) -> bool:
    """Whether `after` is what a move by `far` at most is rounded to."""
    low, high = ((before.double() + way * far).to(before.dtype) for way in (-1, 1))
    return not far or bool(((low <= after) & (after <= high)).all())


def by_hand(
    case: Case,
    dtype: torch.dtype,
    scale: float,
    *,
    autocast: bool = False,
    eps: float | None = None,
    clip: str = "after",
) -> Hand:
    """The step in plain torch."""
    torch.manual_seed(0)
    model, kwargs, loss, optimizer = case.make(torch.float32 if autocast else dtype)
    for group in optimizer.param_groups:
        group["eps"] = eps or group.get("eps")
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        value = loss(model(**kwargs))
    (value * scale).backward()
    held = {name: p for name, p in model.named_parameters() if p.grad is not None}
    made = Hand({name: p.grad.double() / scale for name, p in held.items() if p.grad is not None})
    if case.clip is not None and clip == "before":
        nn.utils.clip_grad_norm_(model.parameters(), case.clip)
    for p in held.values():
        p.grad = p.grad / scale
    if case.clip is not None and clip == "after":
        nn.utils.clip_grad_norm_(model.parameters(), case.clip)
    if case.clip is not None and clip == "wide":
        norm = torch.cat([p.grad.double().flatten() for p in held.values() if p.grad is not None]).norm()
        for p in held.values():
            p.grad = p.grad * min(1.0, case.clip / (float(norm) + 1e-6))
    if case.clip is not None:
        made.gradients = {name: p.grad.double() for name, p in held.items() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    made.weights = {name: (before[name], p.detach()) for name, p in model.named_parameters()}
    return made


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)


def summed(output: Tensor) -> Tensor:
    return output.float().sum()


def of_net(code: Callable[..., Tensor], x: float = 1.0, tokens: int = 2, optimizer: Any = sgd) -> Make:
    def make(dtype: torch.dtype) -> Any:
        model = Net(code).to(dtype)
        return model, {"x": torch.full((1, tokens, 4), x).to(dtype)}, summed, optimizer(model)

    return make


def of_linear(
    x: float, tokens: int, loss: Callable[[Tensor], Tensor] = summed, optimizer: Any = sgd, bias: bool = False
) -> Make:
    def make(dtype: torch.dtype) -> Any:
        model = nn.Linear(4, 4, bias=bias)
        model.weight.data = torch.eye(4)
        model.to(dtype)
        return model, {"input": torch.full((1, tokens, 4), x).to(dtype)}, loss, optimizer(model)

    return make


def of_words(dtype: torch.dtype) -> Any:
    model = nn.Embedding(8, 4).to(dtype)
    return model, {"input": torch.tensor([[3, 3, 3, 5]])}, summed, sgd(model)


def of_decoder(name: str, optimizer: Any = sgd, adapter: bool = False) -> Make:
    def make(dtype: torch.dtype) -> Any:
        model: Any = decoder(name).requires_grad_()
        if adapter:
            torch.manual_seed(0)
            config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
            model = peft.get_peft_model(model, config)
        model.to(dtype)
        return model, {"input_ids": IDS, "labels": IDS}, lambda output: output.loss, optimizer(model)

    return make


def adam_at(rate: float, **how: Any) -> Any:
    return lambda model: torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate, **how)


adam = adam_at(1e-6)


def of_detour(name: str, path: str) -> Make:
    """A gradient overflows between two products after one module, and nowhere before."""
    model: Any = decoder(name).requires_grad_()
    largest = float(seen(model, trained(16.0), path).abs().max())
    power = math.ceil(math.log2(70000 / largest)) + 1
    plain = of_decoder(name)

    def make(dtype: torch.dtype) -> Any:
        model, kwargs, loss, _ = plain(dtype)
        part, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(part), leaf, Detour(model.get_submodule(path), power))
        return model, kwargs, loss, sgd(model)

    return make


def of_checkpoints(name: str, *, reentrant: bool) -> Make:
    """Activations are thrown away, and made anew in the backward pass."""
    plain = of_decoder(name)

    def make(dtype: torch.dtype) -> Any:
        model, *rest = plain(dtype)
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return model, *rest

    return make


class Autocast(nn.Module):
    """A model in float32 whose products are in another dtype, as people train with a GradScaler."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, **kwargs: Any) -> Any:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**kwargs)


def of_autocast(name: str, optimizer: Any = sgd, adapter: bool = False) -> Make:
    plain = of_decoder(name, optimizer, adapter)

    def make(dtype: torch.dtype) -> Any:
        model, kwargs, loss, made = plain(torch.float32)
        return Autocast(model, dtype), kwargs, loss, made

    return make


CASES: tuple[Case, ...] = (
    *(
        Case(name=name, make=of_net(code[0], code[-1].get("x", 1.0)), loss_scale=code[-1].get("scale", 1.0))
        for name, code in BETWEEN.items()
    ),
    Case(name="loss scale at the head", make=of_net(lambda h: h), loss_scale=1e5),
    Case(name="a weight's sum over tokens", make=of_linear(200.0, 100), loss_scale=1000.0),
    Case(name="an embedding's repeated token", make=of_words, loss_scale=30000.0),
    Case(name="a bias's sum over tokens", make=of_linear(1.0, 100, bias=True), loss_scale=1000.0),
    *(Case(name=f"detour after {path}", make=of_detour(name, path), loss_scale=16.0)
        for name, path in (("llama", DOWN), ("qwen2", OUTPUT), ("llama", QUERY),
            ("mistral", "model.layers.0.input_layernorm"), ("qwen3", "model.embed_tokens"))),
    *(Case(name=f"checkpoints, reentrant {reentrant}", make=of_checkpoints("llama", reentrant=reentrant),
        loss_scale=2.0**20) for reentrant in (False, True)),
    *(Case(name=f"autocast, {name}", make=of_autocast(name), loss_scale=2.0**22) for name in ("llama", "qwen2")),
    Case(name="autocast, Adam", make=of_autocast("llama", adam), loss_scale=2.0**22),
    Case(name="autocast, adapter", make=of_autocast("llama", adam, adapter=True), loss_scale=2.0**22),
    Case(name="control, autocast", make=of_autocast("llama", adam), loss_scale=1024.0),
    Case(name="underflow", make=of_linear(1.0, 2, lambda y: y.float().sum() * 1e-9), loss_scale=1.0),
    Case(name="underflow, a scale too small", make=of_linear(1.0, 2, lambda y: y.float().sum() * 1e-12),
        loss_scale=64.0),
    Case(name="norm that overflows", make=of_linear(1.0, 1, lambda y: y.float().sum() * 60000), loss_scale=1.0,
        clip=1.0),
    Case(name="eps of Adam", make=of_decoder("llama", adam), loss_scale=1024.0),
    Case(name="eps of Adam, a usual rate", make=of_decoder("llama", adam_at(1e-3)), loss_scale=1024.0),
    Case(name="eps of Adam that is not 0, and too small", make=of_decoder("llama", adam_at(1e-3, eps=1e-6)),
        loss_scale=1024.0),
    Case(name="eps of Adam, qwen2", make=of_decoder("qwen2", adam), loss_scale=1024.0),
    *(Case(name=f"loss scale too large, {name}", make=of_decoder(name), loss_scale=2.0**20)
        for name in ("llama", "qwen2", "mistral", "gemma", "phi", "qwen3")),
    Case(name="loss scale too large, clipped", make=of_decoder("llama"), loss_scale=2.0**20, clip=1.0),
    Case(name="loss scale too large, adapter", make=of_decoder("llama", adapter=True), loss_scale=2.0**20),
    *(Case(name=f"twice over, {name}", make=of_decoder(name, adam), loss_scale=2.0**20)
        for name in ("llama", "qwen2", "phi")),
    Case(name="twice over, AdamW", make=of_decoder("mistral", lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4)),
        loss_scale=2.0**20),
    Case(name="twice over, adapter", make=of_decoder("llama", adam, adapter=True), loss_scale=2.0**20),
    Case(name="twice over, one layer", make=of_net(lambda h: h * 300, optimizer=adam), loss_scale=300.0),
    Case(name="twice over, underflow", make=of_linear(1.0, 2, lambda y: y.float().sum() * 1e-9, adam),
        loss_scale=1.0),
    Case(name="twice over, norm", make=of_linear(60.0, 4, lambda y: y.float().sum() * 150, sgd), loss_scale=1024.0,
        clip=1.0),
    Case(name="loss scale that is no power of two", make=of_decoder("llama"), loss_scale=1e6),
    Case(name="control, llama", make=of_decoder("llama"), loss_scale=1024.0),
    Case(name="control, clipped", make=of_decoder("qwen2"), loss_scale=1024.0, clip=1.0),
)  # fmt: skip
