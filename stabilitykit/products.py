"""How matrix products of 16-bit tensors are computed.

Processors without 16-bit arithmetic multiply such matrices several times slower than float32 ones. Tensor cores sum
float16 and bfloat16 products in float32 and round the sum once; the same can be had anywhere by widening the
operands, which is exact, and rounding the result. Older and smaller devices keep the running sum of a float16 product
in float16; that can be had too, and overflows where only the result would not.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from stabilitykit.errors import MisuseError

KINDS = "native, float32-accumulate or float16-accumulate:K"

_NARROW_SUM = re.compile(r"float16-accumulate:([1-9]\d*)")

_PRODUCTS = frozenset(
    {
        torch.ops.aten.mm,
        torch.ops.aten.bmm,
        torch.ops.aten.matmul,
        torch.ops.aten.linear,
        torch.ops.aten.addmm,
        torch.ops.aten.baddbmm,
    }
)
_NARROW = (torch.float16, torch.bfloat16)


def check_matmul(kind: str) -> str:
    """`kind` itself. Raises MisuseError for one that is not of `KINDS`, K a positive whole number."""
    if kind not in ("native", "float32-accumulate") and not _NARROW_SUM.fullmatch(kind):
        raise MisuseError(
            f"Matrix products are {KINDS}, which rounds sums to float16 every K terms; {kind!r} is none of them."
        )
    return kind


@contextmanager
def matmul(kind: str) -> Iterator[None]:
    """Inside the block, 16-bit matrix products are the library's own ("native") or summed in another way.

    With "float32-accumulate" operands are widened, multiplied and summed in float32, and the result is rounded once
    to the operands' dtype, ties to even; what leaves its range becomes infinite. A product whose partial sums alone
    would overflow float16 is finite.

    With "float16-accumulate:K" that holds for every K terms of a float16 product, and the sum of what came before and
    those K is rounded to float16 each time: once a partial sum is infinite, the result is, or NaN. bfloat16 products
    are then summed in float32, as on every device that has them.

    Other dtypes are left alone. It works on any model. Enter it before `record`, or let `record` do so: that sees
    16-bit operands and results as always. Raises MisuseError for another name.
    """
    check_matmul(kind)
    if kind == "native":
        yield
        return
    with _Accumulate(kind):
        yield


def matmul_in_force() -> str:
    """The kind of the innermost block that is being executed, "native" outside of all."""
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _Accumulate)]
    return modes[-1].kind if modes else "native"


def preferred_matmul(dtype: str, device: str) -> str:
    """What is fast and accurate there: a CPU's 16-bit products in float32, anything else as it comes."""
    return "float32-accumulate" if dtype in ("float16", "bfloat16") and device == "cpu" else "native"


class _Accumulate(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, kind: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = kind
        terms = _NARROW_SUM.fullmatch(kind)
        self.terms = int(terms[1]) if terms else None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard that True asks for imports the whole compiler, two seconds, on first use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in _PRODUCTS or "out" in kwargs:
            return func(*args, **kwargs)
        dtypes = {argument.dtype for argument in args if isinstance(argument, Tensor)}
        if len(dtypes) != 1 or not dtypes <= set(_NARROW):
            return func(*args, **kwargs)
        dtype = dtypes.pop()
        wide = [argument.float() if isinstance(argument, Tensor) else argument for argument in args]
        if self.terms is None or dtype != torch.float16:
            return func(*wide, **kwargs).to(dtype)
        return _in_steps(func, wide, kwargs, self.terms)


def _in_steps(func: Any, wide: list[Any], kwargs: dict[str, Any], terms: int) -> Tensor:
    """The product of float32 operands, its sum rounded to float16 every `terms` terms; then what is added to it."""
    packet = func.overloadpacket
    if packet in (torch.ops.aten.addmm, torch.ops.aten.baddbmm):
        added, left, right = wide
        product = _summed(left, right, terms).float() * kwargs.get("alpha", 1)
        total: Tensor = product + added * kwargs.get("beta", 1)
        return total.to(torch.float16)
    left, right, *bias = wide
    if packet == torch.ops.aten.linear:
        product = _summed(left, right.mT, terms)
        return (product.float() + bias[0]).to(torch.float16) if bias and bias[0] is not None else product
    return _summed(left, right, terms)


def _summed(left: Tensor, right: Tensor, terms: int) -> Tensor:
    along = -1 if right.ndim == 1 else -2
    pieces = zip(torch.split(left, terms, dim=-1), torch.split(right, terms, dim=along), strict=True)
    total: Tensor | None = None
    for one, other in pieces:
        part = torch.matmul(one, other)
        total = (part if total is None else total.float() + part).to(torch.float16)
    assert total is not None
    return total
