"""Shadows: what is known of each element of a tensor, such as its exponent, as far as elements differ.

A shadow is an int where all elements agree, else an int64 tensor that broadcasts to the tensor's shape: dimensions
along which nothing changes have size one. Operators that only move values are run on the shadow itself, so that a fused
projection that is cut, turned and split needs no rule of its own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Shadow = int | Tensor


def compressed(full: Tensor) -> Shadow:
    """The least that says the same as `full`, which has an entry for each element."""
    for dim in range(full.ndim):
        if full.shape[dim] > 1:
            first = full.narrow(dim, 0, 1)
            if full.stride(dim) == 0 or bool((full == first).all()):
                full = first
    return int(full.reshape(-1)[0]) if full.numel() == 1 else full.contiguous() if full.numel() else 0


def expanded(shadow: Shadow, shape: Sequence[int]) -> Tensor:
    """An entry for each element, without memory of its own where nothing changes."""
    return (torch.tensor(shadow) if isinstance(shadow, int) else shadow).expand(tuple(shape))


def along(values: Sequence[int], dim: int, ndim: int) -> Shadow:
    """The shadow of a tensor of `ndim` dimensions of which only `dim` matters."""
    shape = [1] * ndim
    shape[dim] = -1
    return compressed(torch.tensor(list(values)).reshape(shape))


def with_dimensions(shadow: Shadow, ndim: int) -> Shadow:
    """The same with as many dimensions as the tensor has: as torch does when it broadcasts, they are added in front."""
    return shadow if isinstance(shadow, int) else shadow.reshape((1,) * (ndim - shadow.ndim) + tuple(shadow.shape))


def values(shadow: Shadow) -> list[int]:
    """Every value once, in ascending order."""
    return [shadow] if isinstance(shadow, int) else torch.unique(shadow).tolist()


def same(one: Shadow, other: Shadow) -> bool:
    """Whether both say the same of every element."""
    if isinstance(one, int) or isinstance(other, int):
        return one is other or (isinstance(one, int) and isinstance(other, int) and one == other)
    return one.shape == other.shape and bool((one == other).all())


def elementwise(function: Callable[..., int], *shadows: Shadow) -> Shadow:
    """`function` of each element's values, shapes broadcast as torch does; called once for every combination."""
    if all(isinstance(one, int) for one in shadows):
        return function(*shadows)
    each = [torch.tensor(one) if isinstance(one, int) else one for one in shadows]
    tensors = torch.broadcast_tensors(*each)  # type: ignore[no-untyped-call]
    rows = torch.stack([one.reshape(-1) for one in tensors], dim=1)
    different, which = torch.unique(rows, dim=0, return_inverse=True)
    made = torch.tensor([function(*row) for row in different.tolist()])
    return compressed(made[which].reshape(tensors[0].shape))
