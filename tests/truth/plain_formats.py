"""What a wider format would change: zeros and infinities that only rounding made, poles, and ends of every format."""

import math
from typing import Any

import torch
from torch import Tensor

from truth.plain import BFLOAT, INF, SINGLE, broke, counting, full, lines, rows, source
from truth.row import Expected

X = counting()
W = {"w": torch.ones(4)}
NO_FORMAT = (r"in any (format|dtype)", "wider format will not help", r"(?<!if not, )no number format helps")
A_FORMAT = ("wider range", r"float32 (would|is|gives)", "use (bfloat16|float32)")


def only_here(
    site: str,
    operator: str,
    kind: str | tuple[str, ...],
    rounded: str | tuple[str, ...],
    was: float | None,
    **rest: Any,
) -> Expected:
    """A pole or an invalid operation that only this dtype's rounding made: a wider format has a number there."""
    sites = rounded if isinstance(rounded, tuple) else (rounded,)
    return broke(
        site,
        operator,
        kind,
        rounded=sites,
        rounded_from=was,
        **{"never": NO_FORMAT, "says": ("float16|float32|rounded",)} | rest,
    )


def anywhere(operator: str, kind: str, site: str = "", **rest: Any) -> Expected:
    """No format has a number there."""
    return broke(site or f"/{operator}.0", operator, kind, no_rounding=True, **{"never": A_FORMAT} | rest)


def overflow(operator: str, value: float | None, site: str = "", **rest: Any) -> Expected:
    return broke(site or f"/{operator}.0", operator, "overflow", value=value, **{"never": NO_FORMAT} | rest)


def standardised(m: Any, x: Tensor) -> Tensor:
    x = x * m.w
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-8)


def rms(m: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8) * m.w


def cosine(m: Any, x: Tensor) -> Tensor:
    x = x * m.w
    return x / (x * x).sum(-1, keepdim=True)


def entropy(m: Any, x: Tensor) -> Tensor:
    return torch.log(torch.softmax(x * m.w, -1))


def adam(m: Any, x: Tensor) -> Tensor:
    v = (x * x) * 0.001
    return m.w - 1e-3 * x / (v.sqrt() + 1e-8)


def difference(m: Any, x: Tensor) -> Tensor:
    return 1 / ((x * m.w + 1) - x)


def rope(m: Any, x: Tensor) -> Tensor:
    position = torch.arange(70000, 70004)
    angle = position[:, None].to(x.dtype) * m.frequency
    return x * angle.cos().mean(0)


def filtered(m: Any, x: Tensor) -> Tensor:
    p = torch.softmax(x * m.w, -1)
    kept = torch.where(p > 2, p, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def applied(function: Any) -> Any:
    return lambda m, x: function(x * m.w)


ROWS = rows(
    4,
    ("an eps that rounds to zero", lambda: lines(
        standardised, full(1.0), parameters=W, wide=True,
        expected=only_here("/div.0", "div", "invalid", ("/add.0", "constant"), 1e-8))),
    ("an eps that rounds to zero under a root", lambda: lines(
        rms, full(1e-4), parameters=W, wide=True,
        expected=only_here("/rsqrt.0", "rsqrt", "division-by-zero", ("/add.0", "/pow.0", "/mean.0"), None))),
    ("squares that round to zero", lambda: lines(
        cosine, full(1e-4), parameters=W, wide=True,
        expected=only_here("/div.0", "div", "division-by-zero", ("/mul.1", "/sum.0"), None))),
    ("a probability that rounds to zero", lambda: lines(
        entropy, torch.tensor([[[0.0, 20.0, 0.0, 0.0]]], dtype=torch.float64), parameters=W, wide=True,
        expected=only_here("/log.0", "log", "division-by-zero", "/softmax.0", math.exp(-20)))),
    ("a step of Adam in half", lambda: lines(
        adam, full(1e-5), parameters=W, wide=True,
        expected=only_here("/div.0", "div", ("division-by-zero", "invalid"), ("/add.0", "/mul.*", "constant"), None))),
    ("one that is lost in a sum", lambda: lines(
        difference, full(8192.0), parameters=W, wide=True,
        expected=broke("/reciprocal.0", "reciprocal", "division-by-zero", never=NO_FORMAT))),
    ("a product that rounds to zero", lambda: lines(
        lambda m, x: m.w / (x * 1e-5), full(1e-4), parameters=W, wide=True,
        expected=only_here("/div.0", "div", "division-by-zero", "/mul.0", 1e-9))),
    ("a weight that rounds to zero", lambda: lines(
        lambda m, x: x / m.tiny, X, parameters={"tiny": full(1e-9, 4)},
        expected=broke("/div.0", "div", "division-by-zero"))),
    ("a buffer that rounds to zero", lambda: lines(
        lambda m, x: x * m.w * torch.log(m.tiny), X, parameters=W, buffers={"tiny": full(1e-9, 4)},
        expected=broke(("/log.0", "/constant_log.0"), "log", "division-by-zero"))),
    ("an infinity that half makes of a position", lambda: lines(
        rope, X, buffers={"frequency": torch.ones(4)}, wide=True,
        expected=broke("/constant_cast.0", "cast", "overflow", value=70000.0, never=NO_FORMAT))),
    ("exp past float32's maximum", lambda: lines(
        lambda m, x: torch.exp(x * m.w), full(200.0), parameters=W, dtype=SINGLE, wide=True,
        expected=overflow("exp", math.exp(200), never=(*NO_FORMAT, "use bfloat16"), says=(r"e\+?86",)))),
    ("exp past bfloat16's maximum", lambda: lines(
        lambda m, x: torch.exp(x * m.w), full(200.0), parameters=W, dtype=BFLOAT,
        expected=overflow("exp", math.exp(200), never=("use float32", "bfloat16, float32", *NO_FORMAT)))),
    ("exp past float32's maximum, in float16", lambda: lines(
        lambda m, x: torch.exp(x * m.w), full(200.0), parameters=W,
        expected=overflow("exp", math.exp(200), never=("bfloat16, float32", *NO_FORMAT)))),
    ("exp past float64's maximum", lambda: lines(
        lambda m, x: torch.exp(x * m.w), full(800.0), parameters=W, wide=False,
        expected=broke("/exp.0", "exp", "overflow", value=INF, never=("bfloat16, float32", "wider range")))),
    ("float32's squares", lambda: lines(
        lambda m, x: x * m.w * x, full(1e20), parameters=W, dtype=SINGLE, wide=True,
        expected=overflow("mul", 1e40, "/mul.1", never=("use bfloat16",)))),
    ("bfloat16's squares", lambda: lines(
        lambda m, x: x * m.w * x, full(1e20), parameters=W, dtype=BFLOAT, wide=True,
        expected=overflow("mul", 1e40, "/mul.1", never=("use float32", "bfloat16, float32")))),
    ("float16's squares", lambda: lines(
        lambda m, x: x * m.w * x, full(300.0), parameters=W, wide=True, expected=overflow("mul", 90000.0, "/mul.1"))),
    ("cast to half", lambda: lines(
        lambda m, x: (x * m.w).half() * 0.5, full(1e5), parameters=W, dtype=SINGLE,
        expected=broke("/cast.0", "cast", "overflow", value=1e5, wider=True, says=("float16",)))),
    ("cast to float8 e5m2", lambda: lines(
        lambda m, x: (x * m.w).to(torch.float8_e5m2).to(x.dtype) * 0.5, full(1e6), parameters=W, dtype=SINGLE,
        expected=broke("/cast.0", "cast", "overflow", value=1e6, wider=True, says=("e5m2",)))),
    ("a partial product", lambda: lines(
        lambda m, x: torch.prod(x * m.w, -1), full(1.0), parameters={"w": torch.tensor([3000.0, 3000.0, 0.001, 1.0])},
        wide=True, expected=broke("/prod.0", "prod", "reduction", value=9000.0, says=("partial",)))),
    ("a cumulative sum", lambda: lines(
        lambda m, x: torch.cumsum(x * m.w, -1) - 1, full(30000.0), parameters=W, wide=True,
        expected=overflow("cumsum", 90000.0, channel=2))),
    ("a sum", lambda: lines(
        lambda m, x: (x * m.w).sum(-1) - 1, full(30000.0), parameters=W, wide=True,
            expected=overflow("sum", 120000.0))),
    ("zero by zero", lambda: lines(
        lambda m, x: (x * m.w - x) / (x * m.w - x), X, parameters=W, wide=False, expected=anywhere("div", "invalid"))),
    ("constant rows without an eps", lambda: lines(
        lambda m, x: (x * m.w - 1) / (x * m.w).std(-1, keepdim=True), full(1.0), parameters=W, wide=False,
        expected=anywhere("div", "invalid"))),
    ("nothing left to divide by", lambda: lines(
        filtered, X, parameters=W, wide=False, expected=anywhere("div", "invalid"))),
    ("root of a negative number", lambda: lines(
        applied(torch.sqrt), -X, parameters=W, wide=False, expected=anywhere("sqrt", "invalid"))),
    ("logarithm of a negative number", lambda: lines(
        applied(torch.log), -X, parameters=W, wide=False, expected=anywhere("log", "invalid"))),
    ("arc cosine past one", lambda: lines(
        applied(torch.acos), X + 1, parameters=W, wide=False, expected=anywhere("acos", "invalid"))),
    ("power of a negative number", lambda: lines(
        lambda m, x: (x * m.w) ** 0.5, -X, parameters=W, wide=False, expected=anywhere("pow", "invalid"))),
    ("an empty mean", lambda: lines(
        lambda m, x: (x * m.w)[:, :0].mean(1), X, parameters=W, wide=False, expected=anywhere("mean", "invalid"))),
    ("one by zero", lambda: lines(
        lambda m, x: x / (x * m.w - x), X, parameters=W, wide=False, expected=anywhere("div", "division-by-zero"))),
    ("logarithm of zero", lambda: lines(
        lambda m, x: torch.log(x * m.w - x), X, parameters=W, wide=False,
            expected=anywhere("log", "division-by-zero"))),
    *((f"pole of {name}", lambda name=name, code=code: lines(
        code, full(1.0), parameters=W, wide=False, dtype=SINGLE, expected=anywhere(name, "division-by-zero")))
      for name, code in {
          "atanh": applied(torch.atanh), "logit": applied(torch.logit), "erfinv": applied(torch.erfinv),
          "lgamma": lambda m, x: torch.lgamma(x * m.w - x), "xlogy": lambda m, x: torch.xlogy(x, x * m.w - x),
          "addcdiv": lambda m, x: torch.addcdiv(x, x, x * m.w - x), "log1p": lambda m, x: torch.log1p(-x * m.w),
          "rsqrt": lambda m, x: torch.rsqrt(x * m.w - x), "reciprocal": lambda m, x: 1 / (x * m.w - x),
          "pow": lambda m, x: (x * m.w - x) ** -1.0, "log2": lambda m, x: torch.log2(x * m.w - x),
      }.items()),
    ("opposite infinities from the caller", lambda: lines(
        lambda m, x, y: x * m.w + y, full(INF), full(-INF), parameters=W, wide=False,
        expected=broke(("/mul.0",), (), "input", origin=source("input", "x", False), never=A_FORMAT))),
)  # fmt: skip
