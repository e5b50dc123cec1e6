"""How matrix products of 16-bit tensors are computed.

Processors without 16-bit arithmetic multiply such matrices several times slower than float32 ones. Tensor cores sum
float16 and bfloat16 products in float32 and round the sum once; the same can be had anywhere by widening the
operands, which is exact, and rounding the result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitykit.errors import MisuseError

Matmul = Literal["native", "float32-accumulate"]

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


@contextmanager
def matmul(kind: Matmul) -> Iterator[None]:
    """Inside the block, 16-bit matrix products are the library's own ("native") or summed in float32.

    With "float32-accumulate" operands are widened, multiplied and summed in float32, and the result is rounded once
    to the operands' dtype, ties to even; what leaves its range becomes infinite. A product whose partial sums alone
    would overflow float16 is finite. Other dtypes are left alone. Enter it before `record`, which then sees
    16-bit operands and results as always. Raises MisuseError for another name.
    """
    if kind not in get_args(Matmul):
        raise MisuseError(f"Matrix products are {' or '.join(get_args(Matmul))}; {kind!r} is neither.")
    if kind == "native":
        yield
        return
    with _Float32Accumulate():  # type: ignore[no-untyped-call]
        yield


def preferred_matmul(dtype: str, device: str) -> Matmul:
    """What is fast and accurate there: a CPU's 16-bit products in float32, anything else as it comes."""
    return "float32-accumulate" if dtype in ("float16", "bfloat16") and device == "cpu" else "native"


class _Float32Accumulate(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        wide = [argument.float() if isinstance(argument, Tensor) else argument for argument in args]
        return func(*wide, **kwargs).to(dtypes.pop())
