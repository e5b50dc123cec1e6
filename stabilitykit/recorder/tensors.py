"""The tensors in what operators and modules are given and return."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from stabilitykit.recorder.kernels.layout import FLOATS

Held = TypeVar("Held")

# Those whose tensors are looked at, by the name that records have.
NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
}

_LEAVES = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))


def floating(tree: Any) -> list[Tensor]:
    """The floating and complex tensors in nested arguments or results, in order.

    Without those that have no elements to look at: sparse tensors, and subclasses that wrap others. Of a nested tensor
    it is the memory that all of its parts lie in.
    """
    if type(tree) is Tensor:
        return [tree] if has_elements(tree) else _of_nested(tree)
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def floating_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """As `floating((args, kwargs))`, without a detour: it is asked at every operator."""
    found: list[Tensor] = []
    for argument in args:
        kind = type(argument)
        if kind is Tensor or kind is nn.Parameter:
            if has_elements(argument):
                found.append(argument)
            elif argument.is_nested:
                found += _of_nested(argument)
        elif kind not in _LEAVES:
            _collect(argument, found)
    if kwargs:
        _collect(kwargs, found)
    return found


def _collect(node: Any, found: list[Tensor]) -> None:
    kind = type(node)
    if kind is Tensor or kind is nn.Parameter:
        if has_elements(node):
            found.append(node)
        elif node.is_nested:
            found += _of_nested(node)
    elif kind is tuple or kind is list:
        for leaf in node:
            if type(leaf) not in _LEAVES:
                _collect(leaf, found)
    elif kind is dict:
        for leaf in node.values():
            if type(leaf) not in _LEAVES:
                _collect(leaf, found)
    elif kind not in _LEAVES:
        for leaf in tree_leaves(node):
            if type(leaf) in (Tensor, nn.Parameter) and has_elements(leaf):
                found.append(leaf)


def _of_nested(tensor: Tensor) -> list[Tensor]:
    if not tensor.is_nested or tensor.layout is not torch.strided or tensor.dtype not in NAMES:
        return []
    with aside():
        return [tensor.values()]


def has_elements(tensor: Tensor) -> bool:
    return (
        tensor.dtype in NAMES
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def has_storage(tensor: Tensor) -> bool:
    """Whether its values lie in memory of its own: not those of sparse tensors, nor of lazy modules before they ran."""
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def measurable(tensor: Tensor) -> Tensor:
    """The same values in a dtype that has order and bits: complex numbers as pairs, float8 as float32."""
    if tensor.dtype in FLOATS:
        return tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor.float()


def region(tensor: Tensor) -> tuple[int, int, int]:
    """Which memory, as long as the tensor lives: equal for a tensor and any reshaped view of all of it."""
    elements = tensor.numel()
    address = (tensor.data_ptr() if elements else 0) or tensor.untyped_storage()._cdata  # on the meta device all are 0
    return address, elements, tensor.element_size()


def is_here(tensor: Tensor) -> bool:
    """Whether nothing has to be waited for to look at its values; on the meta device there are none to look at."""
    return tensor.device.type in ("cpu", "meta")


def is_view_of(tensor: Tensor, other: Tensor) -> bool:
    """Whether both are of the same storage."""
    return bool(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata)


class ByStorage(dict[int, Held]):
    """Something for each storage, by its address. Weak references keep an address from being used again, so a key never
    lies; what has gone is forgotten now and then.
    """

    def __init__(self, room: int) -> None:
        """`room`: so many more than were alive the last time may be held before those that have gone are forgotten."""
        super().__init__()
        self._room = self._forget_at = room

    def claim(self, storage: torch.UntypedStorage) -> None:
        """Before a storage is held for the first time."""
        storage._weak_ref()
        if len(self) > self._forget_at:
            expired, free = torch.UntypedStorage._expired, torch.UntypedStorage._free_weak_ref
            for gone in [address for address in self if expired(address)]:
                del self[gone]
                free(gone)  # type: ignore[no-untyped-call]
            self._forget_at = 2 * len(self) + self._room

    def release(self) -> None:
        """Forgets everything."""
        for address in self:
            torch.UntypedStorage._free_weak_ref(address)  # type: ignore[no-untyped-call]
        self.clear()


@contextmanager
def aside() -> Iterator[None]:
    """Around operators of an observer's own, which no operator mode is to see."""
    with _disable_current_modes(), torch.no_grad():
        yield
