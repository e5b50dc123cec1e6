"""How much memory a run takes, counted on the meta device, where nothing has a value and nothing takes any."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from stabilitykit.models import matmul as products


def peak_bytes(run: Callable[[], object], *, matmul: str, device: str) -> int:
    """The most bytes of tensors made in `run`, on the meta device, that live at one time, as they would on `device`."""
    seen = _Allocations(device)
    with torch.inference_mode(), seen, products.matmul(matmul):
        run()
    return seen.peak


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds storages on the meta device up as they come and go."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cuda = device.startswith("cuda")
        self.live = self.peak = 0
        self.known: set[int] = set()  # addresses of storages

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard that True asks for imports the whole compiler, two seconds, on first use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.cuda and func is torch.ops.aten.softmax.int and _is_widened_in_the_kernel(*args, **kwargs):
            func, args, kwargs = torch.ops.aten._softmax.default, (*args[:2], True), {}
        with self:
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        for tensor in _tensors((args, kwargs)):
            self.see(tensor.untyped_storage(), 0)  # a weight, or the cache: it was there before
        output = func(*args, **kwargs)
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            self.see(storage, storage.nbytes())
        return output

    def see(self, storage: torch.UntypedStorage, taken: int) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += taken
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage._cdata, taken)

    def forget(self, address: int, taken: int) -> None:
        self.known.remove(address)
        self.live -= taken


def _tensors(of: Any) -> Iterator[Tensor]:
    return (one for one in tree_iter(of) if isinstance(one, Tensor) and one.is_meta)


def _is_widened_in_the_kernel(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> bool:
    """CUDA's softmax reads float16 and computes float32 in one kernel; bfloat16, and on a CPU, is cast first."""
    return scores.dtype == torch.float16 and dtype == torch.float32
