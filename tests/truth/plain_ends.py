"""Damage that ends inside the model: what is finite again afterwards, and whether it is right."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from truth.plain import Lines, broke, full, lines, rows
from truth.row import Expected, Planted
from truth.score import finite

X = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [400.0, -2.0, 1.0, 0.5]]], dtype=torch.float64)  # 400² is past the maximum
W = {"w": torch.ones(4)}


def ended(
    operator: str,
    by: str | tuple[str, ...],
    *,
    harmless: bool | None = None,
    value: float | None = None,
    site: str = "",
    **rest: Any,
) -> Expected:
    """A break whose damage is gone in the end. In a harmless one the result is what a wider format gives; None where
    the code itself says what stands for a number that is too large.
    """
    says = (r"harmless|nothing is lost|no effect|same (value|result)|changes nothing",) if harmless else ()
    return broke(
        site or f"/{operator}.0", operator, "overflow", value=value, outcome="absorbed", harmless=harmless,
        absorbed_by=by if isinstance(by, tuple) else (by,),
        **{"says": says, "never": ("every token is lost",)} | rest,
    )  # fmt: skip


def absorbed(code: Any, x: Tensor, expected: Expected, **how: Any) -> Planted:
    """Shows by float64 whether what comes out is right."""
    planted = lines(code, x, expected=expected, wide=True, **how)

    def symptom(result: Any) -> None:
        wide = Lines(code, how.get("parameters", {}), how.get("buffers", {}), how.get("modules", dict)).eval().double()
        with torch.inference_mode():
            right = wide(x.double())
        assert finite(right)
        same = torch.allclose(result.double(), right, rtol=0.02, atol=0.02)
        assert expected.harmless in (None, same), (result, right)

    return Planted(model=planted.model, run=planted.run, expected=expected, symptom=symptom)


def layer_norm(m: Any, x: Tensor) -> Tensor:
    d = x - x.mean(-1, True)
    return d / ((d * d).mean(-1, True) + 1e-5).sqrt() * m.w


def rms_norm(m: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * m.w


def unit(m: Any, x: Tensor) -> Tensor:
    x = x * m.w
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def mish(m: Any, x: Tensor) -> Tensor:
    return x * torch.tanh(torch.log(1 + torch.exp(x * m.w)))


def sigmoid(m: Any, x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x * m.w))


def swish(m: Any, x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x * m.w))


def big(x: Tensor) -> Tensor:
    return x * x


def eight_bits(m: Any, x: Tensor) -> Tensor:
    return (big(x) * m.w).to(torch.float8_e4m3fn).to(x.dtype)


def integers(m: Any, x: Tensor) -> Tensor:
    scaled = big(x) * m.w
    return scaled.round().clamp(-127, 127).to(torch.int8).to(x.dtype)


def if_infinite(m: Any, x: Tensor) -> Tensor:
    y = big(x) * m.w
    if torch.isinf(y).any():
        y = torch.clamp(y, min=-64504, max=64504)
    return y * 0.5


def top(m: Any, x: Tensor) -> Tensor:
    return x.amin(-1) + (big(x) * m.w).amin(-1)


def negative(m: Any, x: Tensor) -> Tensor:
    return torch.softmax(torch.stack([-big(x[..., 0]) * m.w[0], x[..., 1] * 0], -1), -1)


def spared(m: Any, x: Tensor) -> Tensor:
    y = big(x) * m.w
    return torch.where(x > 300, x, y)


def spread(m: Any, x: Tensor) -> Tensor:
    y = big(x) * m.w
    return x * 100 / y.amax()


CAP = lambda m, x: torch.tanh(big(x) * m.w / 30) * 30  # noqa: E731
REAL = 160000.0

_FAULTS = rows(
    3,
    ("layer norm in half", lambda: absorbed(
        layer_norm, X, ended("mul", "div", harmless=False, value=300.1**2, row=0, position=1), parameters=W)),
    ("RMS norm in half", lambda: absorbed(
        rms_norm, X, ended("pow", "rsqrt", harmless=False, value=REAL, row=0, position=1), parameters=W)),
    ("unit length in half", lambda: absorbed(
        unit, X, ended("mul", "div", harmless=False, value=REAL, row=0, position=1, site="/mul.1"), parameters=W)),
    ("norm of a vector", lambda: absorbed(
        lambda m, x: x * m.w / torch.linalg.vector_norm(x * m.w, dim=-1, keepdim=True), full(60000.0),
        ended("norm", "div", harmless=False, value=120000.0), parameters=W)),
    ("clamp", lambda: absorbed(
        lambda m, x: (big(x) * m.w).clamp(-64504, 64504) * 0.5, X,
        ended("mul", ("clamp", "clamp_max"), value=REAL, row=0, position=1), parameters=W)),
    ("clamp where something is infinite", lambda: absorbed(
        if_infinite, X, ended("mul", "clamp", value=REAL, position=1), parameters=W)),
    ("nan_to_num", lambda: absorbed(
        lambda m, x: torch.nan_to_num(big(x) * m.w, posinf=0.0), X,
        ended("mul", "nan_to_num", harmless=False, value=REAL, position=1), parameters=W)),
    ("minimum with a number", lambda: absorbed(
        lambda m, x: torch.minimum(big(x) * m.w, m.top), X,
        ended("mul", "minimum", value=REAL, position=1), parameters=W, buffers={"top": full(60000.0, 1)})),
    ("one over it", lambda: absorbed(
        lambda m, x: 30000 / (big(x) * m.w + 1), X,
        ended("mul", ("reciprocal", "div"), harmless=False, value=REAL, position=1), parameters=W)),
    ("eight-bit cast", lambda: absorbed(
        eight_bits, X, ended("mul", "cast", value=REAL, position=1), parameters=W)),
    ("eight-bit integers", lambda: absorbed(
        integers, X, ended("mul", "clamp", value=REAL, position=1), parameters=W)),
    ("smallest of a row", lambda: absorbed(
        top, X, ended("mul", "amin", value=REAL, position=1), parameters=W)),
    ("scaled by the largest", lambda: absorbed(
        spread, X, ended("mul", "div", harmless=False, value=REAL), parameters=W)),
    ("soft-cap", lambda: absorbed(CAP, X, ended("mul", "tanh", harmless=True, value=REAL, position=1), parameters=W)),
    ("soft-cap of a negative", lambda: absorbed(
        lambda m, x: torch.tanh(-big(x) * m.w / 30) * 30, X,
        ended("mul", "tanh", harmless=True, value=REAL, position=1), parameters=W)),
    ("sigmoid", lambda: absorbed(
        lambda m, x: torch.sigmoid(big(x) * m.w), X, ended("mul", "sigmoid", harmless=True, value=REAL), parameters=W)),
    ("sigmoid by hand", lambda: absorbed(
        sigmoid, full(-20.0), ended("exp", ("div", "reciprocal", "mul"), harmless=True, value=485165195.0),
            parameters=W)),
    ("swish by hand", lambda: absorbed(
        swish, full(-20.0), ended("exp", "div", harmless=True, value=485165195.0), parameters=W)),
    ("mish by hand", lambda: absorbed(
        mish, full(20.0), ended("exp", "tanh", harmless=True, value=485165195.0), parameters=W)),
    ("negative under relu", lambda: absorbed(
        lambda m, x: F.relu(-big(x) * m.w) + x, X, ended("mul", "relu", harmless=True, value=REAL), parameters=W)),
    ("negative under exp", lambda: absorbed(
        lambda m, x: torch.exp(-big(x) * m.w), X, ended("mul", "exp", harmless=True, value=REAL), parameters=W)),
    ("negative under softmax", lambda: absorbed(
        negative, X, ended("mul", "softmax", harmless=True, value=REAL), parameters=W)),
    ("arc tangent", lambda: absorbed(
        lambda m, x: torch.atan(big(x) * m.w), X, ended("mul", "atan", harmless=True, value=REAL), parameters=W)),
    ("not chosen", lambda: absorbed(
        spared, X, ended("mul", "where", harmless=True, value=REAL, position=1), parameters=W)),
)  # fmt: skip

# Whether a choice keeps the lost element out in every dtype, records of one run do not tell.
_UNSAID = {"not chosen": "the condition may be a test for infinity", "swish by hand": "its true value is no zero"}
ROWS = tuple(replace(row, shortcoming=_UNSAID.get(row.name, "")) for row in _FAULTS)
