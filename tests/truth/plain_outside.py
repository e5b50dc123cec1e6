"""Outside the model: the user's own code, losses, backward passes, second models and samplers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from truth.plain import HALF, SINGLE, Lines, broke, rows
from truth.row import Expected, Planted

X = torch.ones(1, 2, 4, dtype=HALF)
OUTSIDE = "outside*"
SAMPLER = ("temperature", "top_p", "top_k", "sampl", "greedy")


def outside(operator: str | tuple[str, ...], kind: str | tuple[str, ...], *says: str, **rest: Any) -> Expected:
    return broke(OUTSIDE, operator, kind, outcome=None, **{"says": ("outside", *says), "never": SAMPLER} | rest)


def linear(dtype: torch.dtype = HALF, scale: float = 0.25) -> nn.Module:
    made = nn.Linear(4, 4, bias=False)
    made.weight.data[:] = scale * torch.eye(4)
    return made.to(dtype).requires_grad_(False)


def after(run: Callable[[Any], Any], expected: Expected, **how: Any) -> Planted:
    """What the user does with the model's output; the output itself is finite."""
    model: Any = linear(**how)

    def symptom(result: Any) -> None:
        assert bool(model(X.to(model.weight.dtype)).isfinite().all())
        assert not bool(result.float().isfinite().all())

    return Planted(model=model, run=run, expected=expected, symptom=symptom)


def scaled(m: Any) -> Tensor:
    z: Tensor = m(X) * 1e6
    return z


def by_itself(m: Any) -> Tensor:
    z = m(X) * 0
    return z / z


def second(m: Any) -> Tensor:
    other = linear(scale=300.0)
    return other(other(m(X) * 4))


def cross_entropy(m: Any) -> Tensor:
    logits = m(X.float()).flatten(0, 1)
    return nn.functional.cross_entropy(logits, torch.full((2,), -100)).reshape(1)


def squared_error(m: Any) -> Tensor:
    return ((m(X) - 400) ** 2).mean().reshape(1)


def divergence(m: Any) -> Tensor:
    p = torch.tensor([[[0.0, 1, 0, 0]] * 2])
    return (m(X.float()) * torch.log(p)).sum().reshape(1)


def similarity(m: Any) -> Tensor:
    a = m(X) * 0
    return (a * a).sum(-1) / (a.norm(dim=-1) * a.norm(dim=-1))


def metric(m: Any) -> Tensor:
    out = m(X)
    return torch.exp(out * 100)


def filled(m: Any) -> Tensor:
    out = m(X).clone()
    out[0, 1, 2] = float("nan")
    return out * 2


def before(m: Any) -> Tensor:
    """The user's preprocessing breaks, and the model is handed what it made."""
    return m(X * 60000 * 2)


def trained(value: float, dtype: torch.dtype = HALF) -> Callable[[Any], Any]:
    def run(m: Any) -> Any:
        m.zero_grad()
        loss = m(X.to(dtype)).float().sum()
        (loss * value).backward()
        return [p.grad for p in m.parameters()]

    return run


def backward(
    model: nn.Module, value: float, name: str | tuple[str, ...], dtype: torch.dtype = HALF, **rest: Any
) -> Planted:
    names = name if isinstance(name, tuple) else (name,)
    run = trained(value, dtype)

    def symptom(result: Any) -> None:
        lost = {n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())}
        assert set(names) <= lost, lost
        with torch.no_grad():
            assert bool(model(X.to(dtype)).isfinite().all())

    return Planted(
        model=model.requires_grad_(), run=run, symptom=symptom, grad=True,
        expected=Expected(
            sites=tuple(f"backward/{one}" for one in names), kinds=("unresolved", "overflow"),
                says=("backward|gradient",),
            never=(*SAMPLER, "finite throughout"), wider=True, **rest,
        ),
    )  # fmt: skip


def two() -> nn.Module:
    return nn.Sequential(linear(), linear())


def root() -> nn.Module:
    """The gradient of a root at zero is infinite, in any dtype."""
    return Lines(lambda m, x: torch.sqrt(m.w * x - x), {"w": torch.ones(4)}, {}, dict)


def sampler(expected: Expected, draw: Callable[[Tensor], Tensor]) -> Planted:
    return after(lambda m: draw(m(X)), expected)


ROWS = rows(
    7,
    ("the output times a million", lambda: after(
        scaled, outside("mul", "overflow", r"z: Tensor = m\(X\) \* 1e6|plain_outside\.py"))),
    ("nothing by nothing", lambda: after(by_itself, outside("div", "invalid", "plain_outside"))),
    ("a second model", lambda: after(second, outside("matmul", "overflow", "plain_outside", value=90000.0))),
    ("labels that are all ignored", lambda: after(
        cross_entropy, outside((), "invalid", "plain_outside"), dtype=SINGLE)),
    ("a squared error", lambda: after(squared_error, outside("pow", "overflow", "plain_outside"))),
    ("a logarithm of a label of zero", lambda: after(
        divergence, outside("log", ("division-by-zero",), "plain_outside"), dtype=SINGLE)),
    ("a similarity of nothing", lambda: after(similarity, outside("div", "invalid", "plain_outside"))),
    ("an exponential of the output", lambda: after(metric, outside("exp", "overflow", "plain_outside"))),
    ("NaN that the user writes", lambda: after(filled, outside((), "constant", "plain_outside"))),
    ("what is made before the model is called", lambda: Planted(
        model=linear(), run=before, expected=broke(OUTSIDE, "mul", "overflow", coarse=("input",), says=("outside",),
            never=SAMPLER))),
    ("a temperature of the user's own", lambda: sampler(
        outside("div", "overflow", "plain_outside").but(never=("temperature None",)),
            lambda z: torch.softmax(z / 1e-6, -1))),
    ("a top-p of the user's own", lambda: sampler(
        outside("div", "invalid", "plain_outside").but(never=("top_p = None",)),
        lambda z: torch.where(z > 9, z, 0) / torch.where(z > 9, z, 0).sum(-1, keepdim=True))),
    ("gradient of one weight", lambda: backward(linear(), 2.0**17, "weight")),
    ("gradients of two layers", lambda: backward(two(), 2.0**20, ("1.weight", "0.weight"))),
    ("gradient of a root at zero", lambda: backward(root(), 1.0, "w", SINGLE)),
    ("gradient in float32", lambda: backward(linear(SINGLE, 0.01), 2e38, "weight", SINGLE)),
)  # fmt: skip
