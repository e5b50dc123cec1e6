"""Where a tensor's values came from: a weight, a constant, an input, or a record."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

OriginKind = Literal["weight", "constant", "input", "computed"]


@dataclass(slots=True)
class Origin:
    """What is known of a tensor's values: whether any was lost, and which ones a mask hides (None: none).

    `pairs`: each joins two positions, as attention scores and probabilities do.
    `name` is a parameter's path or stands in for a site; `entry` is the number of its record, if it has one.
    """

    kind: OriginKind
    name: str
    entry: int | None = None
    lost: bool = False
    masked: Tensor | None = None
    pairs: bool = False

    @property
    def may_mask(self) -> bool:
        return self.kind in ("constant", "input")


class Origins:
    """The origin of each storage in use: views share it, whatever is written anew replaces it."""

    def __init__(self, *, weights: Iterable[tuple[str, Tensor]], constants: Iterable[tuple[str, Tensor]]) -> None:
        """`weights` are parameters; `constants` are buffers, which may hold masks and be written to.

        Their storages are kept from being freed: a model that swaps its weights while it runs would else give their
        addresses to others.
        """
        weights, constants = list(weights), list(constants)
        self._weights = {tensor.untyped_storage()._cdata: name for name, tensor in weights}
        self._constants = {tensor.untyped_storage()._cdata: name for name, tensor in constants}
        self._kept = [tensor for _, tensor in (*weights, *constants)]
        self._held: dict[int, tuple[StorageWeakRef, Origin]] = {}
        self._forget_at = 256

    def of(self, tensor: Tensor) -> Origin:
        """A scalar nobody has seen made is a constant; anything else unseen was passed in."""
        key = tensor.untyped_storage()._cdata
        if key in self._held:
            return self._held[key][1]
        if key in self._weights:
            return Origin("weight", self._weights[key])
        if key in self._constants:
            return Origin("constant", self._constants[key])
        if isinstance(tensor, nn.Parameter):  # brought in after the block began
            return Origin("weight", "a parameter")
        return Origin("constant" if tensor.ndim == 0 else "input", "input")

    def remember(self, tensor: Tensor, origin: Origin) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._weights:
            return
        # The weak reference keeps the storage's address from being used again, so a key never lies.
        self._held[storage._cdata] = (StorageWeakRef(storage), origin)  # type: ignore[no-untyped-call]
        if len(self._held) > self._forget_at:
            self._held = {key: held for key, held in self._held.items() if not held[0].expired()}  # type: ignore[no-untyped-call]
            self._forget_at = 2 * len(self._held) + 256

    def forget(self) -> None:
        self._held.clear()
        self._kept.clear()


def region(tensor: Tensor) -> tuple[int, ...]:
    """Which elements of which storage: equal for a tensor and any reshaped view of all of it."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel(), tensor.element_size()
