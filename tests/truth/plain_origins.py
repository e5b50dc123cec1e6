"""Where damage came from, in a few lines of code: weights, buffers, inputs, constants, and whatever moves them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truth.plain import INF, NAN, SINGLE, broke, counting, full, lines, rows, source
from truth.row import Expected, Planted

X = counting()
BIG = full(60000.0, 2, 4)
NOT_OVERFLOW = ("overflows in", r"finite operands")


def constant(
    site: str | tuple[str, ...], operator: str | tuple[str, ...] = (), name: str | tuple[str, ...] = (), **rest: Any
) -> Expected:
    """NaN or an infinity that the code put in."""
    never = (*NOT_OVERFLOW, "wider range")
    names = (name if isinstance(name, tuple) else (name,)) + ("nan", "inf") if name else ()
    return broke(site, operator, "constant", origin=source("constant", names, False), **{"never": never} | rest)


def weight(site: str | tuple[str, ...], kind: str, name: str, **rest: Any) -> Expected:
    return broke(site, (), "weight", origin=source(kind, name, False), says=(name,), **{"never": NOT_OVERFLOW} | rest)


def given(site: str | tuple[str, ...], name: str, **rest: Any) -> Expected:
    return broke(
        site,
        (),
        "input",
        origin=source("input", (name, f"*{name}*"), False),
        says=(name,),
        **{"never": NOT_OVERFLOW} | rest,
    )


def overflow(
    site: str | tuple[str, ...],
    operator: str | tuple[str, ...],
    value: float | None,
    kind: str | tuple[str, ...] = "computed",
    **rest: Any,
) -> Expected:
    return broke(site, operator, "overflow", value=value, origin=source(kind, (), True), **rest)


def assign(m: Any, x: Tensor) -> Tensor:
    y = x * 1
    y[0, 1] = NAN
    return y + 1


def assign_where(m: Any, x: Tensor) -> Tensor:
    y = x * 1
    y[y > 7] = INF
    return y + 1


def unwritten(m: Any, x: Tensor) -> Tensor:
    keys = torch.full((4, 4), NAN, dtype=x.dtype)  # memory of which only a half is written
    keys[:2] = x[0]
    return x @ keys.T


def cached(m: Any, x: Tensor) -> Tensor:
    m.keys.index_copy_(0, torch.arange(2), x[0])
    return x @ m.keys.T


def foreach(m: Any, x: Tensor) -> Tensor:
    y = [x * 1]
    torch._foreach_mul_(y, 60000.0)
    return y[0] - 1


@torch.library.custom_op("truth::scale_", mutates_args=("x",))
def scale_(x: Tensor) -> None:
    x.mul_(60000)


def custom(m: Any, x: Tensor) -> Tensor:
    y = x * 1
    scale_(y)
    return y - 1


def in_view(m: Any, x: Tensor) -> Tensor:
    y = x * 1
    y[:, 1].mul_(60000)
    return y - 1


def out_argument(m: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.mul(x, 60000, out=y)
    return y - 1


def split(m: Any, x: Tensor) -> Tensor:
    first, second = (x * m.w).chunk(2, -1)
    return first + second


def nested(m: Any, batch: dict[str, list[Tensor]]) -> Tensor:
    return batch["pixels"][0] * m.w


def fill_new(m: Any, x: Tensor) -> Tensor:
    return x * 1 + x.new_full((4,), INF)


def between(m: Any, x: Tensor) -> Tensor:
    return m.second(m.first(x) * 60000)


def linears() -> dict[str, nn.Module]:
    return {"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)}


def damaged(module: nn.Module, name: str, value: float) -> dict[str, nn.Module]:
    owner = module.get_submodule(name.rpartition(".")[0]) if "." in name else module
    getattr(owner, name.rpartition(".")[2]).data.flatten()[1] = value
    return {"part": module}


def norm_buffer() -> dict[str, nn.Module]:
    part = nn.BatchNorm1d(4)
    assert part.running_var is not None
    part.running_var[1] = NAN
    return {"part": part}


ONE, W = torch.ones(4), {"w": torch.ones(4)}
PART = lambda m, x: m.part(x)  # noqa: E731
ZERO = torch.zeros(2, dtype=torch.long)


def closure() -> Planted:
    outside = torch.tensor([1.0, NAN, 1.0, 1.0]).half()
    return lines(
        lambda m, x: x * m.w * outside, X, parameters=W,
        expected=broke("/mul.1", "mul", ("constant", "input"),
            origin=source(("outside", "constant", "input"), (), False),
                       never=NOT_OVERFLOW),
    )  # fmt: skip


def moved(code: Any, value: float, operator: str) -> Planted:
    return lines(
        code, BIG, wide=True, expected=overflow((f"/{operator}.*",), operator, value, kind=("input", "computed"),
            never=("finite operands",)),
    )  # fmt: skip


ROWS = rows(
    1,
    ("masked_fill with NaN", lambda: lines(
        lambda m, x: (x * m.w).masked_fill(x > 7, NAN) + 1, X, parameters=W, wide=False,
        expected=constant("/masked_fill.0", "masked_fill", "masked_fill*"))),
    ("masked_fill with infinity", lambda: lines(
        lambda m, x: (x * m.w).masked_fill(x > 7, INF) + 1, X, parameters=W, wide=False,
        expected=constant("/masked_fill.0", "masked_fill", "masked_fill*"))),
    ("where with NaN", lambda: lines(
        lambda m, x: torch.where(x > 7, NAN, x * m.w) + 1, X, parameters=W, wide=False,
        expected=constant("/where.0", "where"))),
    ("clamp to NaN", lambda: lines(
        lambda m, x: (x * m.w).clamp(max=NAN) + 1, X, parameters=W, wide=False,
        expected=constant("/clamp.0", "clamp", "clamp*"))),
    ("nan_to_num that puts infinity in", lambda: lines(
        lambda m, x: torch.nan_to_num((x - x) / (x - x) if m.training else x * m.w - 8, nan=INF).masked_fill(x > 7,
            INF) * 2,
        X, parameters=W, expected=constant("/masked_fill.0", "masked_fill"))),
    ("an element assigned", lambda: lines(assign, X, wide=False, expected=constant("/*", (), ()))),
    ("elements assigned by a mask", lambda: lines(assign_where, X, wide=False, expected=constant("/*", (), ()))),
    ("padding with NaN", lambda: lines(
        lambda m, x: F.pad(x * m.w, (0, 1), value=NAN) * 2, X, parameters=W, wide=False,
        expected=constant(("/constant_pad_nd.0", "/pad.0", "/mul.1")))),
    ("concatenated with infinity", lambda: lines(
        lambda m, x: torch.cat([x * m.w, torch.full((1, 2, 1), INF, dtype=x.dtype)], -1) - 1, X, parameters=W,
            wide=False,
        expected=constant(("/cat.0", "/sub.0", "/full.0")))),
    ("memory that was not written", lambda: lines(
        unwritten, X, wide=False, expected=constant(("/matmul.0", "/full.0", "/copy.0", "/slice*", "/cast*")))),
    ("new_full with infinity", lambda: lines(
        fill_new, X, wide=False, expected=constant(("/add.0", "/new_full.0", "/full*")))),
    ("a buffer's slots that were not written", lambda: lines(
        cached, X, buffers={"keys": full(NAN, 4, 4)}, wide=False,
        expected=weight(("/matmul.0", "/index_copy.0"), "buffer", "keys"))),
    ("NaN in a buffer", lambda: lines(
        lambda m, x: x + m.shift, X, buffers={"shift": torch.tensor([0, NAN, 0, 0])}, wide=False,
        expected=weight("/add.0", "buffer", "shift"))),
    ("running variance that is NaN", lambda: lines(
        PART, X[0], modules=norm_buffer, dtype=SINGLE, expected=weight("part*", "buffer", "part.running_var"))),
    ("NaN in a bias", lambda: lines(
        PART, X, modules=lambda: damaged(nn.Linear(4, 4), "bias", NAN),
            expected=weight("part", "weight", "part.bias"))),
    ("infinity in a weight", lambda: lines(
        PART, X, modules=lambda: damaged(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "1.weight", INF),
        expected=weight("part.1", "weight", "part.1.weight"))),
    ("NaN in a convolution's weight", lambda: lines(
        PART, counting(1, 2, 6), modules=lambda: damaged(nn.Conv1d(2, 3, 3), "weight", NAN), dtype=SINGLE,
        expected=weight("part", "weight", "part.weight"))),
    ("NaN in a norm's gain", lambda: lines(
        PART, X, modules=lambda: damaged(nn.LayerNorm(4), "weight", NAN),
            expected=weight("part*", "weight", "part.weight"))),
    ("a parameter that .half() made infinite", lambda: lines(
        lambda m, x: x + m.w, X, parameters={"w": torch.tensor([1.0, 70000.0, 1, 1])}, wide=True,
        expected=weight("/add.0", "weight", "w", never=(*NOT_OVERFLOW, r"(?<!if not, )no number format helps")))),
    ("a parameter cast inside", lambda: lines(
        lambda m, x: x + m.w.float().mul(35000).to(x.dtype), X, parameters={"w": 2 * ONE}, wide=None,
        expected=overflow("/cast.0", "cast", 70000.0))),
    ("NaN in the input", lambda: lines(
        lambda m, x: x * m.w, torch.where(X > 7, NAN, X), parameters=W, expected=given("/mul.0", "x"))),
    ("NaN in a named input", lambda: lines(
        lambda m, *, pixels: pixels * m.w, parameters=W, named={"pixels": torch.where(X > 7, INF, X)},
        expected=given("/mul.0", "pixels"))),
    ("NaN in an input that lies deeper", lambda: lines(
        nested, {"pixels": [torch.where(X > 7, NAN, X).half()]}, parameters=W,
            expected=given("/mul.0", "batch").but(origin=source("input", ("batch", "*pixels*"), False),
                says=("batch|pixels",)))),
    ("a tensor from outside", closure),
    ("index_put that adds", lambda: moved(
        lambda m, x: (x * 1).index_put_((ZERO,), x, accumulate=True) - 1, 180000.0, "index_put")),
    ("scatter that adds", lambda: moved(
        lambda m, x: (x * 1).scatter(0, torch.zeros(1, 4, dtype=torch.long), x, reduce="add") - 1, 120000.0,
            "scatter")),
    ("scatter_add", lambda: moved(
        lambda m, x: (x * 1).scatter_add(0, torch.zeros(1, 4, dtype=torch.long), x) - 1, 120000.0, "scatter_add")),
    ("index_add", lambda: moved(
        lambda m, x: (x * 1).index_add(0, torch.zeros(1, dtype=torch.long), x[:1]) - 1, 120000.0, "index_add")),
    ("index_reduce by product", lambda: lines(
        lambda m, x: (x * 1).index_reduce(0, ZERO[:1], x[:1], "prod") - 1, full(300.0, 2, 4), wide=True,
        expected=overflow("/index_reduce.0", "index_reduce", 90000.0, kind=("computed", "input"),
            never=("finite operands",)))),
    ("foreach", lambda: lines(
        foreach, full(2.0), wide=True, expected=broke("/*foreach_mul*", (), "overflow", value=120000.0,
            never=("finite operands",)))),
    ("a custom operator that writes and returns nothing", lambda: lines(
        custom, full(2.0), wide=True, expected=broke("/scale*", (), ("overflow", "unresolved"),
            never=("finite operands",)))),
    ("a view that is written", lambda: lines(
        in_view, full(2.0), wide=True,
        expected=overflow("/mul.1", "mul", 120000.0, kind=("computed", "constant"), row=0,
            never=("finite operands",)))),
    ("an out argument", lambda: lines(
        out_argument, full(2.0), wide=True, expected=overflow("/mul.0", "mul", 120000.0, kind=("input", "constant")))),
    ("halves of a tensor", lambda: lines(
        split, full(2.0), parameters={"w": torch.tensor([1.0, 1.0, 40000.0, 1.0])}, wide=True,
        expected=overflow("/mul.0", "mul", 80000.0, kind="weight", channel=2))),
    ("between two modules", lambda: lines(
        between, full(2.0), modules=linears, wide=True,
        expected=broke("/mul.0", "mul", "overflow", origin=source(("computed", "constant"), (), True)))),
    ("concatenated after an overflow", lambda: lines(
        lambda m, x: torch.cat([x * 1, x * 60000], -1) - 1, full(2.0), wide=True,
        expected=overflow("/mul.1", "mul", 120000.0, kind=("input", "constant")))),
    ("flipped, rolled and stacked after an overflow", lambda: lines(
        lambda m, x: torch.stack([x.flip(-1), (x * 60000).roll(1, 0)]) - 1, full(2.0), wide=True,
        expected=overflow("/mul.0", "mul", 120000.0, kind=("input", "constant")))),
)  # fmt: skip
