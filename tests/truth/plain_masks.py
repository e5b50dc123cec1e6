"""What is a mask and what is not: attention and sums in a few lines of code."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from truth.plain import INF, SINGLE, broke, counting, full, lines, rows, source
from truth.row import Expected, Planted

MINIMUM = -65504.0
SIZE = 4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, SIZE, 8, dtype=torch.float64, generator=GENERATOR)
CAUSAL = torch.full((SIZE, SIZE), -INF, dtype=torch.float64).triu(1)
ROW_GONE = CAUSAL.clone()
ROW_GONE[2] = -INF
LAST_HIDDEN = torch.zeros(2, 1, SIZE, dtype=torch.float64)
LAST_HIDDEN[0, 0, 3] = 1.0


def scores(x: Tensor) -> Tensor:
    return x @ x.mT / math.sqrt(8)


def attend(s: Tensor, x: Tensor) -> Tensor:
    return torch.softmax(s, -1) @ x


def add(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return attend(scores(x) + mask, x)


def add_twice(m: Any, x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
    return attend(scores(x) + mask + other, x)


def fill(m: Any, x: Tensor, hidden: Tensor) -> Tensor:
    return attend(scores(x).masked_fill(hidden, -INF), x)


def choose(m: Any, x: Tensor, hidden: Tensor) -> Tensor:
    return attend(torch.where(hidden, -INF, scores(x)), x)


def choose_minimum(m: Any, x: Tensor, hidden: Tensor) -> Tensor:
    return attend(torch.where(hidden, torch.finfo(x.dtype).min, scores(x)), x)


def times_buffer(m: Any, x: Tensor, hidden: Tensor) -> Tensor:
    return attend(scores(x) + hidden * m.big, x)


def fused(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]


def peak(m: Any, x: Tensor, hidden: Tensor) -> Tensor:
    """The largest of what is not hidden, as pooling takes it."""
    return x.masked_fill(hidden[..., None], -INF).amax(1)


def bias(m: Any, x: Tensor) -> Tensor:
    """Not a mask: no softmax and no maximum follows."""
    return (x * m.w + m.bias) * 0.25


def smoothed(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    s = scores(x) + mask
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ x


W = {"w": torch.ones(4)}
ANYWHERE = ("overflows in", "wider range")  # a row without keys is NaN in any format


def row_gone(site: str = "/softmax.0", *, rows: tuple[int, ...] = (0, 1), position: int = 2, **rest: Any) -> Expected:
    return broke(
        site, "softmax", "masked-row", row=rows[0], rows=rows, position=position, says=("mask", "every key"),
        never=ANYWHERE, no_rounding=True, **rest,
    )  # fmt: skip


def only_here(code: Any, *inputs: Any, was: float, at: str = "/add.*", **rest: Any) -> Planted:
    """Every key of a row hidden by a sum that only this dtype makes infinite."""
    return lines(
        code, X, *inputs, wide=True,
        expected=broke("/softmax.0", "softmax", "masked-row", rounded=(at,), rounded_from=was, says=("float16",),
                       never=("in any (dtype|format)", "use the dtype's minimum in place"), **rest),
    )  # fmt: skip


def key_hidden() -> Tensor:
    hidden = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    hidden[1] = True
    return hidden


def minimum_row() -> Tensor:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    mask[2] = MINIMUM
    return mask


def wrong_sign() -> Tensor:
    return torch.zeros(SIZE, SIZE, dtype=torch.float64).masked_fill(torch.ones(SIZE, SIZE).triu(1).bool(), INF)


def buffer(code: Any, x: Tensor, value: float, operator: str, **rest: Any) -> Planted:
    """Large negative numbers in a buffer are no mask where nothing hides anything."""
    return lines(
        code, x, parameters=W, buffers={"bias": full(-40000.0, 2, 4)}, wide=True,
        expected=broke(f"/{operator}.0" if operator != "mul" else "/mul.1", operator, "overflow", value=value,
                       origin=source(("buffer", "computed"), (), True), never=("is masked", "hides", "every key"),
                           **rest),
    )  # fmt: skip


FAULTS = rows(
    2,
    ("-inf for a whole row", lambda: lines(add, X, ROW_GONE, wide=False, expected=row_gone())),
    ("-inf for a whole row, float32", lambda: lines(add, X, ROW_GONE, wide=False, dtype=SINGLE, expected=row_gone())),
    ("-inf for a whole row, filled", lambda: lines(
        fill, X, key_hidden(), wide=False, expected=row_gone(position=1))),
    ("-inf for a whole row, chosen", lambda: lines(
        choose, X, key_hidden(), wide=False, expected=row_gone(position=1))),
    ("all keys are padding in one row of the batch", lambda: lines(
        lambda m, x, h: fill(m, x, h), X, torch.tensor([[[False] * 4], [[True] * 4]]), wide=False,
        expected=row_gone(rows=(1,), position=0))),
    ("the minimum twice", lambda: only_here(add_twice, minimum_row(), minimum_row(), was=2 * MINIMUM, position=2)),
    ("the minimum and a very negative score", lambda: only_here(
        lambda m, x, mask: attend(scores(x) - 100 + mask, x), minimum_row(), was=MINIMUM - 100, position=2)),
    ("a mask times a buffer that .half() made infinite", lambda: lines(
        times_buffer, X, LAST_HIDDEN, buffers={"big": torch.tensor([-1e30], dtype=torch.float64)}, wide=True,
        expected=broke("/mul.0", "mul", "weight", origin=source("buffer", "big", False), row=0,
                       says=("big",), never=("check what",)))),
    ("infinity of the wrong sign", lambda: lines(
        add, X, wrong_sign(), wide=False,
        expected=broke(("/add.0", "/softmax.0"), (), ("input",), origin=source("input", ("mask", "*mask*"), False)))),
    ("sum with a large negative buffer", lambda: buffer(
        lambda m, x: x * m.w + m.bias, full(-40000.0), -80000.0, "add")),
    ("product with a large negative buffer", lambda: buffer(
        lambda m, x: x * m.w * m.bias, full(2.0), -80000.0, "mul")),
    ("sum of a 4-D input with itself", lambda: lines(
        lambda m, x: x + x, full(-40000.0, 1, 1, 2, 4), wide=True,
        expected=broke("/add.0", "add", "overflow", value=-80000.0, origin=source("input", "x", True),
            never=("is masked", "hides", "every key")))),
    ("sum of a 4-D input and a 4-D buffer", lambda: lines(
        lambda m, x: (x + m.bias) * 0.5, full(-40000.0, 1, 1, 4, 4), buffers={"bias": full(-33000.0, 1, 1, 4, 4)},
        wide=True, expected=broke("/add.0", "add", "overflow", value=-73000.0,
            never=("is masked", "hides", "every key")))),
    ("scores at plus infinity under a mask of -inf", lambda: lines(
        lambda m, x, mask: attend(x @ x.mT + mask, x), X * 200, CAUSAL, wide=True,
        expected=broke("/matmul.0", "matmul", "overflow", position=0, never=("masked", "every key")))),
)  # fmt: skip

SILENT = rows(
    2,
    ("control, causal", lambda: lines(add, X, CAUSAL, expected=None)),
    ("control, causal, bfloat16", lambda: lines(add, X, CAUSAL, dtype=torch.bfloat16, expected=None)),
    ("control, filled", lambda: lines(fill, X, CAUSAL.isinf(), expected=None)),
    ("control, chosen", lambda: lines(choose, X, CAUSAL.isinf(), expected=None)),
    ("control, the minimum chosen", lambda: lines(choose_minimum, X, CAUSAL.isinf(), expected=None)),
    ("control, a whole row at the minimum", lambda: lines(choose_minimum, X, key_hidden(), expected=None)),
    ("control, the minimum and a score beside keys that are seen", lambda: lines(
        lambda m, x, mask: attend(scores(x) - 100 + mask, x), X, CAUSAL.nan_to_num(neginf=MINIMUM), expected=None)),
    ("control, two masks beside keys that are seen", lambda: lines(
        add_twice, X, CAUSAL.nan_to_num(neginf=MINIMUM), CAUSAL.nan_to_num(neginf=MINIMUM), expected=None)),
    ("control, fused", lambda: lines(fused, X, CAUSAL, expected=None)),
    ("control, fused, a whole row", lambda: lines(fused, X, ROW_GONE, dtype=SINGLE, expected=None)),
    ("control, largest of what is seen", lambda: lines(
        peak, X, torch.tensor([[False, False, True, True], [False] * 4]), expected=None)),
    ("control, logsumexp", lambda: lines(smoothed, X, CAUSAL, expected=None)),
    ("control, a mask made of -inf in the model", lambda: lines(
        lambda m, x: attend(scores(x) + torch.full((SIZE, SIZE), -INF, dtype=x.dtype).triu(1), x), X, expected=None)),
    ("control, triangle cut with -inf", lambda: lines(
        lambda m, x: attend(scores(x).masked_fill(torch.ones(SIZE, SIZE).tril() == 0, -INF), x), X, expected=None)),
    ("control, top two kept", lambda: lines(
        lambda m, x: torch.softmax(x.masked_fill(x < x.topk(2, -1).values[..., -1:], -INF), -1), X, expected=None)),
    ("control, large negative buffer that fits", lambda: lines(
        bias, counting(), parameters=W, buffers={"bias": full(-40000.0, 2, 4)}, expected=None)),
    ("control, mask of a float32 minimum cast", lambda: lines(
        lambda m, x: attend(scores(x) + torch.full((SIZE, SIZE), torch.finfo(torch.float32).min).triu(1).to(x.dtype),
            x),
        X, expected=None)),
)  # fmt: skip

ROWS = (*FAULTS, *SILENT)
