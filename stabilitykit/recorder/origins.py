"""Where a tensor's values came from: a weight, a constant, an input, or a record."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from stabilitykit.recorder.tensors import is_here

OriginKind = Literal["weight", "constant", "input", "computed"]


@dataclass(frozen=True, slots=True)
class Hidden:
    """Where a mask hides elements: booleans in the shape of the tensor, whose strides are `stride`.

    `count` of them are True, at least one; None where to count them would be to wait for a device.
    """

    where: Tensor
    stride: tuple[int, ...]
    count: int | None

    def expand(self, shape: Sequence[int]) -> "Hidden":
        where = self.where.expand(shape)
        count = None if self.count is None else self.count * (where.numel() // self.where.numel())
        return Hidden(where, where.stride(), count)


def hidden(where: Tensor, stride: tuple[int, ...]) -> Hidden | None:
    """`Hidden`, or None where no element is; what a device computes is not looked at, and may hide none."""
    if where.is_meta:
        return None
    if not is_here(where):
        return Hidden(where, stride, None)
    count = int(where.sum())
    return Hidden(where, stride, count) if count else None


@dataclass(slots=True)
class Origin:
    """What is known of a tensor's values: whether any was lost, and which ones a mask hides (None: none).

    `pairs`: each joins two positions, as attention scores and probabilities do. `hidden` remembers where a constant or
    an input, seen in some shape and strides, is a mask; `clear`: nowhere, as a look at all of it has shown.
    `name` is a parameter's path or stands in for a site; `entry` is the number of its record, if it has one.
    """

    kind: OriginKind
    name: str
    entry: int | None = None
    lost: bool = False
    masked: Hidden | None = None
    pairs: bool = False
    hidden: dict[tuple[object, ...], Hidden | None] | None = None
    clear: bool = False
    looked_at: bool = False

    @property
    def may_mask(self) -> bool:
        return self.kind == "constant" or self.kind == "input"

    @property
    def may_hide(self) -> bool:
        return self.masked is not None or self.may_mask


class Origins:
    """The origin of each storage in use: views share it, whatever is written anew replaces it."""

    def __init__(
        self, *, weights: Callable[[], Iterable[tuple[str, Tensor]]], constants: Iterable[tuple[str, Tensor]]
    ) -> None:
        """`weights` gives the parameters that there are now; `constants` are buffers, which may hold masks and be
        written to.

        The storages that there are at first are kept from being freed: a model that swaps its weights while it runs
        would else give their addresses to others. `weights` is asked again when a parameter is met that is none of
        them: of a streamed model each is there only while its module runs.
        """
        self._weights = weights
        named, constants = list(weights()), list(constants)
        self._kept = [tensor for _, tensor in (*named, *constants)]
        self._named = {name: Origin("weight", name) for name, _ in named}
        self._own = {tensor.untyped_storage()._cdata: Origin("constant", name) for name, tensor in constants}
        self._own |= {tensor.untyped_storage()._cdata: self._named[name] for name, tensor in named}
        self._lent: dict[int, tuple[StorageWeakRef, Origin]] = {}
        self._held: dict[int, Origin] = {}
        self._forget_at = 256

    def of(self, tensor: Tensor) -> Origin:
        """A scalar nobody has seen made is a constant; anything else unseen was passed in."""
        key = tensor.untyped_storage()._cdata
        held = self._held.get(key)
        if held is not None:
            return held
        lent = self._lent.get(key)
        if lent is not None:
            return lent[1]
        own = self._own.get(key)
        if own is not None:
            return own
        if isinstance(tensor, nn.Parameter):  # brought in after the block began
            self._look_again()
            lent = self._lent.get(key)
            if lent is not None:
                return lent[1]
            origin = Origin("weight", "a parameter")
        else:
            origin = Origin("constant" if tensor.ndim == 0 else "input", "input")
        if tensor.ndim:  # a scalar may be a view of something else
            self.remember(tensor, origin)
        return origin

    def _look_again(self) -> None:
        """Knows the parameters that there are now by their names, and those that have gone no longer."""
        self._lent = {key: lent for key, lent in self._lent.items() if not lent[0].expired()}  # type: ignore[no-untyped-call]
        for name, tensor in self._weights():
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own and storage._cdata not in self._lent:
                origin = self._named.setdefault(name, Origin("weight", name))
                self._lent[storage._cdata] = (StorageWeakRef(storage), origin)  # type: ignore[no-untyped-call]

    def remember(self, tensor: Tensor, origin: Origin) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        own = self._own.get(key)
        if (own is not None and own.kind == "weight") or key in self._lent:
            return
        if key not in self._held:
            # A weak reference keeps the storage's address from being used again, so a key never lies.
            storage._weak_ref()
            if len(self._held) > self._forget_at:
                expired, free = torch.UntypedStorage._expired, torch.UntypedStorage._free_weak_ref
                for gone in [address for address in self._held if expired(address)]:
                    del self._held[gone]
                    free(gone)  # type: ignore[no-untyped-call]
                self._forget_at = 2 * len(self._held) + 256
        self._held[key] = origin

    def forget(self) -> None:
        held, self._held = self._held, {}
        for address in held:
            torch.UntypedStorage._free_weak_ref(address)  # type: ignore[no-untyped-call]
        self._lent.clear()
        self._kept.clear()
