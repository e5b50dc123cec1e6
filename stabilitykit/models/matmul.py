"""How matrix products of 16-bit tensors are computed.

Processors without 16-bit arithmetic multiply such matrices several times slower than float32 ones. Tensor cores sum
float16 and bfloat16 products in float32 and round the sum once; the same can be had anywhere by widening the
operands, which is exact, and rounding the result. Older and smaller devices keep the running sum of a float16 product
in float16; that can be had too, and overflows where only the result would not.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from stabilitykit.errors import MisuseError
from stabilitykit.models.operators import OperatorMode, Traits

KINDS = "native, float32-accumulate, float16-accumulate:K"

_NARROW_SUM = re.compile(r"float16-accumulate:([1-9]\d*)")

_NARROW = (torch.float16, torch.bfloat16)
_VECTORS = (torch.ops.aten.mv.default, torch.ops.aten.dot.default)
_MATRICES = (
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
)

BUFFER = 1 << 21
"""Elements of the right operand, a layer's weight, that are widened at once, unless 256 columns are more.

They go through a buffer that stays in the processor's caches, so that memory is read once and in 16 bits.
"""
_COLUMNS = 256  # fewer make products slow
_LEFT = 1 << 26  # elements of the left operand: 256 MiB


def blocks(batch: int, inner: int) -> tuple[int, int]:
    """Rows of the left and columns of the right operand that are widened at once, of `batch` matrices."""
    deep = max(1, batch * inner)
    return max(1, _LEFT // deep), max(_COLUMNS, BUFFER // deep)


def check_matmul(kind: str) -> str:
    """`kind` itself. Raises MisuseError unless it is one of `KINDS`, with K a positive integer."""
    if kind not in ("native", "float32-accumulate") and not _NARROW_SUM.fullmatch(kind):
        raise MisuseError(
            f"unknown matmul mode {kind!r}; choose one of: {KINDS} (K terms are summed between roundings to float16)"
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


class _Accumulate(OperatorMode):  # type: ignore[no-untyped-call]
    def __init__(self, kind: str) -> None:
        super().__init__(self.run, apart=lambda kind: kind.name == "matmul")  # the others would cost time
        self.kind = kind
        terms = _NARROW_SUM.fullmatch(kind)
        self.terms = int(terms[1]) if terms else None
        self.buffers: dict[torch.device, Tensor] = {}

    def run(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        func = kind.func
        if kind.name != "matmul" or func not in (*_VECTORS, *_MATRICES):
            return func(*args, **kwargs)
        dtypes = {argument.dtype for argument in args if isinstance(argument, Tensor)}
        if len(dtypes) != 1 or not dtypes <= set(_NARROW):
            return func(*args, **kwargs)
        if func in _VECTORS:
            return self.piece(func, (), args[0].float(), args[1], kwargs)
        *added, left, right = args
        if left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-2]:
            return func(*args, **kwargs)  # which says what is wrong with them
        return self.product(func, added, left, right, kwargs)

    def product(
        self, func: Any, added: Sequence[Tensor], left: Tensor, right: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """[..., M, K] times [..., K, N], matrices or batches of them, a few rows and columns at a time."""
        *batch, rows, inner = left.shape
        columns = right.shape[-1]
        height, width = blocks(math.prod(batch), inner)
        if rows <= height and columns <= width:
            return self.piece(func, added, left.float(), right, kwargs)
        out = left.new_empty((*batch, rows, columns))
        addends = [term.expand(out.shape) for term in added]
        for top in range(0, rows, height):
            wide = left[..., top : top + height, :].float()
            for first in range(0, columns, width):
                part = (..., slice(top, top + height), slice(first, first + width))
                terms = [term[part] for term in addends]
                out[part] = self.piece(func, terms, wide, right[..., first : first + width], kwargs)
            del wide  # before there is another
        return out

    def piece(self, func: Any, added: Sequence[Tensor], wide: Tensor, right: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """As `product`, of a left operand that is already float32; rounded to the dtype of the other."""
        widened = self.widened(right)
        if self.terms is None or right.dtype != torch.float16:
            result: Tensor = func(*(term.float() for term in added), wide, widened, **kwargs)
            return result.to(right.dtype)
        total = _summed(wide, widened, self.terms)
        if added:
            total = total.float() * kwargs.get("alpha", 1) + added[0].float() * kwargs.get("beta", 1)
        return total.to(torch.float16)

    def widened(self, tensor: Tensor) -> Tensor:
        """The tensor in float32, in memory that the next call writes over."""
        buffer = self.buffers.pop(tensor.device, None)
        if buffer is None or buffer.numel() < tensor.numel():
            del buffer
            with torch.inference_mode(False):  # or it could not be written to outside of that mode
                buffer = torch.empty(max(BUFFER, tensor.numel()), dtype=torch.float32, device=tensor.device)
        self.buffers[tensor.device] = buffer
        # a linear layer's weight is stored by its output rows
        turned = tensor.ndim > 1 and tensor.stride(-1) > tensor.stride(-2)
        shape = tensor.mT.shape if turned else tensor.shape
        place = buffer[: tensor.numel()].view(shape)
        return (place.mT if turned else place).copy_(tensor)


def _summed(left: Tensor, right: Tensor, terms: int) -> Tensor:
    """The product of float32 operands, its sum rounded to float16 every `terms` terms."""
    total: Tensor | None = None
    along = -min(2, right.ndim)
    for one, other in zip(torch.split(left, terms, dim=-1), torch.split(right, terms, dim=along), strict=True):
        part = torch.matmul(one, other)
        total = (part if total is None else total.float() + part).to(torch.float16)
    assert total is not None
    return total
