"""Where a tensor's values came from: a weight, a constant, an input, or a record."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from stabilitykit.recorder.tensors import ByStorage, is_here
from stabilitykit.records import OriginKind

if TYPE_CHECKING:
    from stabilitykit.recorder.entry import Entry
    from stabilitykit.recorder.rounding import Made, Rounded

Role = Literal[
    "query", "key", "value", "scores", "probabilities",  # of attention
    "given", "squares", "mean square", "mean square + eps", "1 / root", "normalised",  # of a root mean square norm
    "product",  # of two computed tensors, element by element
]  # fmt: skip
"""What a tensor is for, as far as the names of projections and the data flow tell."""


@dataclass(frozen=True, slots=True)
class Emptied:
    """`code` outside the model hid all of a row; `entry` is the number of its record."""

    code: str | None
    entry: int


@dataclass(slots=True, eq=False)
class Mask:
    """Very negative numbers that hide elements, if that is what they are for.

    They are for that (`confirmed`) where they are added to attention scores, where -inf is selected, and where what
    they were added to goes to a softmax or a maximum. `parts` are the masks that this one was joined from.
    """

    confirmed: bool = False
    parts: tuple["Mask", ...] = ()
    overflowed: "Rounded | None" = None
    emptied: "Emptied | None" = None

    def overflow(self) -> "Rounded | None":
        """Where adding it gave -inf out of finite numbers, and what that should have been."""
        return self.overflowed or next((found for part in self.parts if (found := part.overflow())), None)

    def empties(self) -> "Emptied | None":
        """The code outside the model that left some row nothing to choose from."""
        return self.emptied or next((found for part in self.parts if (found := part.empties())), None)

    def confirm(self) -> None:
        self.confirmed = True
        for part in self.parts:
            if not part.confirmed:
                part.confirm()


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


@dataclass(slots=True, eq=False)
class Origin:
    """What is known of a tensor's values.

    `name` is a parameter's path, an argument's name, an operator's, or stands in for a site; `entry` is the number of
    its record, if it has one. `lost`: it holds an element that is not finite and that no mask hides. Of what was put
    together from several tensors `leaves` are those that were not computed. Of a constant that is not finite `trail` is
    the record in the making of the operator that made it so. `masked` is where a mask, `mask`, hides elements (None:
    nowhere); `of_mask`: it holds infinities that come of a mask's -inf, such as its negative.

    `scores`: a product of two computed tensors, or made of one element by element, as attention scores are. `role`:
    what it is for. `hidden` remembers where something that was not computed, seen in some shape and strides, is a mask;
    `clear`: nowhere, as a look at all of it has shown.
    `holds_infinity`: a mask's own, once that is known; `overflowed`: a mask that arithmetic made -inf. `made`: by which
    call, for as long as that is kept.
    """

    kind: OriginKind
    name: str
    entry: int | None = None
    lost: bool = False
    leaves: tuple["Origin", ...] = ()
    trail: "Entry | None" = None
    of_mask: bool = False
    masked: Hidden | None = None
    mask: Mask | None = None
    scores: bool = False
    role: Role | None = None
    hidden: dict[tuple[object, ...], Hidden | None] | None = None
    clear: bool = False
    looked_at: bool = False
    holds_infinity: bool | None = None
    overflowed: "Rounded | None" = None
    made: "Made | None" = field(default=None, repr=False)

    @property
    def source(self) -> "Origin | None":
        """What was not finite to begin with, if this is not finite and no record of an operator says why."""
        if self.kind != "computed" and not self.leaves:
            return self
        return next((leaf for leaf in self.leaves if leaf.lost), next(iter(self.leaves), None))

    @property
    def may_mask(self) -> bool:
        return self.kind not in ("computed", "weight")

    @property
    def may_hide(self) -> bool:
        return self.masked is not None or self.may_mask


class Origins:
    """The origin of each storage in use: views share it, whatever is written anew replaces it."""

    def __init__(
        self,
        *,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        buffers: Iterable[tuple[str, Tensor]],
        unseen: OriginKind = "outside",
    ) -> None:
        """`weights` gives the parameters that there are now; `buffers` may hold masks and be written to. `unseen` is
        what a tensor is that nobody was told of: made before the block began, or by operators that nobody watches.

        The storages that there are at first are kept from being freed: a model that swaps its weights while it runs
        would else give their addresses to others. `weights` is asked again when a parameter is met that is none of
        them: of a streamed model each is there only while its module runs.
        """
        self._weights = weights
        self._unseen = unseen
        named, buffers = list(weights()), list(buffers)
        self._kept = [tensor for _, tensor in (*named, *buffers)]
        self._named = {name: Origin("weight", name) for name, _ in named}
        self._own = {tensor.untyped_storage()._cdata: Origin("buffer", name) for name, tensor in buffers}
        self._own |= {tensor.untyped_storage()._cdata: self._named[name] for name, tensor in named}
        self._lent: dict[int, tuple[StorageWeakRef, Origin]] = {}
        self._held: ByStorage[Origin] = ByStorage(256)

    def of(self, tensor: Tensor) -> Origin:
        """A scalar nobody has seen made is a constant."""
        key = tensor.untyped_storage()._cdata
        held = self._held.get(key)
        if held is not None and not (held.kind == "constant" and isinstance(tensor, nn.Parameter)):
            return held  # a parameter is a weight, also where it was made inside the block
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
            origin = Origin("constant", "scalar") if tensor.ndim == 0 else Origin(self._unseen, "a tensor")
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

    def is_still(self, tensor: Tensor, origin: Origin) -> bool:
        """Whether nothing has been written into it since it had this origin, as far as was seen."""
        key = tensor.untyped_storage()._cdata
        held = self._held.get(key)
        if held is None and key in self._lent:
            held = self._lent[key][1]
        return held is None or held is origin

    def remember(self, tensor: Tensor, origin: Origin) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        own = self._own.get(key)
        if (own is not None and own.kind == "weight") or key in self._lent:
            return
        if key not in self._held:
            self._held.claim(storage)
        self._held[key] = origin

    def forget(self) -> None:
        self._held.release()
        self._lent.clear()
        self._kept.clear()
