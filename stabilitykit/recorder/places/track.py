"""Following: which labels the tensors have that every operator reads and writes.

Each storage has the labels of what was written into it; views are looked up in them by their strides. What an operator
does with labels depends on the operator, its arguments that are no tensors and the labels of those that are, so that
it is found out once and remembered: a pass through twenty equal layers asks for one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabilitykit.models.operators import Traits
from stabilitykit.recorder.places.grids import GRIDS, convolved
from stabilitykit.recorder.places.hiding import FUSED, Hiding
from stabilitykit.recorder.places.labels import NONE, Label, Labels, blank, changed, label, labels, spread
from stabilitykit.recorder.places.lookup import BY_VALUE, by_indices
from stabilitykit.recorder.places.memory import in_memory, refined, view, written
from stabilitykit.recorder.places.rules import RULES, Request, pointwise, unknown
from stabilitykit.recorder.places.streams import Entering, Step, Stream

_REMEMBERED = 1 << 13  # calls
_FILLS = frozenset("fill zero normal uniform random exponential bernoulli geometric cauchy log_normal".split())
_SIMPLE = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))


class _Held:
    """What is known of a storage: labels as of one contiguous tensor, the bytes of an element, and since which step."""

    __slots__ = ("labels", "size", "step")

    def __init__(self, labels: Labels, size: int, step: Step) -> None:
        self.labels = labels
        self.size = size
        self.step = step


class Tracker:
    """Which row and position every element belongs to, from the tensors that entered the model on.

    `step` is the present one. What is not known belongs nowhere; whatever goes wrong in here, it makes things unknown
    and nothing else, and is noted in `failures`.
    """

    def __init__(self) -> None:
        self.step = Step(-1)
        self.failures: list[str] = []
        self._held: dict[int, _Held] = {}
        self._weak: set[int] = set()  # storages whose address we keep from being used again
        self._forget_at = 1024
        self._calls: dict[tuple[Any, ...], tuple[Labels, ...]] = {}
        self._translated: dict[tuple[int, int], tuple[Labels, Step, Labels]] = {}
        self._hiding = Hiding()
        self._known = self._pairs = False  # of the call that is looked at: anything is known; elements join positions

    # Steps

    def begin(self, step: Step) -> None:
        self.step = step
        self._translated.clear()
        self._hiding.clear()

    def enter(self, entering: Entering, stream: Stream) -> None:
        """Gives the tensor's elements to a stream of the present step."""
        slot = len(self.step.streams)
        self.step.streams.append(stream)
        self.give(entering, slot)

    def give(self, entering: Entering, slot: int) -> None:
        tensor = entering.tensor
        shape = tuple(tensor.shape)
        made: list[Label | None] = []
        for dim in (entering.row, entering.position):
            if dim is None:
                made.append(None)
            else:
                made.append(label(np.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])))
        row, position = made
        found = labels(shape, row, position, slot=slot, raw=not entering.ids)
        self._remember(tensor, found)
        base = self._held[tensor.untyped_storage()._cdata].labels
        base.views[(tensor.shape, tensor.stride(), tensor.storage_offset())] = found  # rows may share their memory

    def of(self, tensor: Tensor) -> Labels:
        """The labels of a tensor, or of a view of one."""
        try:
            return self._of(tensor)
        except Exception as failed:  # never in the way of a forward pass
            self._fail(failed)
            return blank(tuple(tensor.shape))

    def _of(self, tensor: Tensor) -> Labels:
        held = self._held.get(tensor.untyped_storage()._cdata)
        shape = tensor.shape
        if held is None:
            return blank(tuple(shape))
        base = held.labels
        if held.step is not self.step:
            base = self._translate(held)
        size = tensor.itemsize
        strides, offset = tensor.stride(), tensor.storage_offset()
        if size != held.size:
            if size % held.size == 0:  # complex numbers made of pairs
                parts = size // held.size
                strides, offset = tuple(stride * parts for stride in strides), offset * parts
            elif held.size % size == 0:
                base = refined(base, held.size // size)
            else:
                return spread([base], tuple(shape))
        found = base.views.get((shape, strides, offset))
        return view(base, tuple(shape), strides, offset) if found is None else found

    def _translate(self, held: _Held) -> Labels:
        """Labels of an earlier step in terms of this one: positions count from where this one begins."""
        old, then, now = held.labels, held.step, self.step
        held.step = now
        if old.blank:
            return old
        key = id(old), id(then)
        found = self._translated.get(key)
        if found is None:
            found = self._translated[key] = (old, then, translated(old, then, now))
        held.labels = found[2]
        return found[2]

    # Operators

    def result(self, kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """After an operator that is no view has run."""
        try:
            self._result(kind, args, kwargs, output)
        except Exception as failed:  # never in the way of a forward pass
            self._fail(failed)
            for tensor in _outputs(output):
                self._remember(tensor, blank(tuple(tensor.shape)))

    def _fail(self, failed: Exception) -> None:
        if len(self.failures) < 8:
            self.failures.append(f"{type(failed).__name__}: {failed}")

    def _result(self, kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        key: list[Any] = [kind]
        self._known = False
        self._pairs = kind.name == FUSED
        self._name(args, key)
        if kwargs:
            self._name(kwargs.values(), key)
            key.append(tuple(kwargs))
        outputs = (output,) if type(output) is Tensor else _outputs(output)
        if not self._known:
            if not kind.writes_in_place:
                for tensor in outputs:
                    self._remember(tensor, blank(tensor.shape))
            return
        if kind.writes_in_place:
            self._write(kind, args, kwargs, outputs)
            return
        name = kind.name
        checked = 0
        if self._pairs and name in self._hiding.names:
            checked = self._hiding.look(kind, named(kind, args, kwargs), self)
            key.append(checked)
        for tensor in outputs:
            key.append(tensor.shape)
        found: tuple[Labels, ...] | None = None
        by_value = name in BY_VALUE or name in GRIDS
        if not by_value:
            found = self._calls.get(tuple(key))
        if found is None:
            found = self._found(kind, args, kwargs, outputs, checked)
            if not by_value:
                if len(self._calls) > _REMEMBERED:
                    self._calls.clear()
                self._calls[tuple(key)] = found
        for tensor, own in zip(outputs, found, strict=False):
            self._remember(tensor, own, given=(args, kwargs) if not kind.combines else None)

    def _name(self, given: Any, key: list[Any]) -> None:
        """Puts what tells one call from another into `key`: the labels of tensors, and other arguments as they are."""
        for argument in given:
            kind = type(argument)
            if kind is Tensor or kind is nn.Parameter:
                held = self._held.get(argument.untyped_storage()._cdata)
                if held is None:
                    key.append(argument.shape)
                    continue
                found = self._of(argument)
                key.append(found)
                if not found.blank:
                    self._known = True
                    if found.key is not None:
                        self._pairs = True
            elif kind in _SIMPLE:
                key.append(argument)
            elif kind is list or kind is tuple:
                key.append(len(argument))
                self._name(argument, key)
            else:
                key.append(id(argument))
                if isinstance(argument, Tensor):
                    self._known = True

    def _found(
        self, kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Tensor], checked: int
    ) -> tuple[Labels, ...]:
        shapes = [tuple(tensor.shape) for tensor in outputs]
        request = Request(kind, named(kind, args, kwargs), self.of, shapes)
        if checked:
            request.hidden, request.checks = self._hiding.claim(checked)
        found = self._labels(request, outputs)
        return tuple(
            one if one is not None and one.shape == shape else spread([self.of(t) for t in request.tensors], shape)
            for one, shape in zip(found, shapes, strict=True)
        )

    def _labels(self, request: Request, outputs: Sequence[Tensor]) -> Sequence[Labels | None]:
        name = request.kind.name
        if name in GRIDS:
            return convolved(request, self._begin_grid)
        if name in ("sort", "topk") and len(outputs) == 2:
            own = request.own
            ndim = len(own.shape)
            dim = int(request.given.get("dim", -1)) % max(1, ndim)
            if any(part is not None and dim in part.dims for part in (own.row, own.position)):
                found = by_indices(own, dim, outputs[1])
                if found is not None:
                    return [found, found]
        if name.startswith("_foreach_"):
            parts = [request.of(t) for t in request.given["self"]]
            return [part if part.shape == shape else None for part, shape in zip(parts, request.shapes, strict=False)]
        rule = RULES.get(name)
        if rule is None:
            rule = pointwise if request.kind.pointwise else unknown
        return rule(request)

    def _begin_grid(self, counts: str, shape: tuple[int, ...], length: int) -> int:
        self.step.streams.append(Stream("", 0, shape[0], length, counts))
        return len(self.step.streams) - 1

    # Writes

    def _write(self, kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Tensor]) -> None:
        into: list[Tensor] = []
        for place, name in kind.written:
            given = args[place] if place < len(args) else kwargs.get(name)
            into += _outputs(given)
        given = named(kind, args, kwargs)
        out = {name for _, name in kind.written if name.startswith("out")}
        replaced = {name: value for name, value in given.items() if name not in out}
        shapes = [tuple(tensor.shape) for tensor in into]
        request = Request(kind, replaced, self.of, shapes)
        if self._pairs and kind.name in self._hiding.names:
            checked = self._hiding.look(kind, given, self)
            if checked:
                request.hidden, request.checks = self._hiding.claim(checked)
        found: Sequence[Labels | None]
        if kind.name in _FILLS:
            whole = [t.numel() == t.untyped_storage().nbytes() // t.itemsize for t in into]
            found = [
                blank(s) if all_ and kind.name == "zero" else _standing(self.of(t))
                for t, s, all_ in zip(into, shapes, whole, strict=True)
            ]
        elif kind.name.startswith("_foreach_"):
            found = [self.of(tensor) for tensor in into]
        elif kind.name == "cast":
            source = request.labels("src")
            own = self.of(into[0])
            if source is None or (source.blank and shapes[0] == own.shape):
                found = [_standing(own)]
            else:
                found = pointwise(Request(kind, {"src": given["src"]}, self.of, shapes))
        else:
            found = self._labels(request, into)
        for tensor, own in zip(into, found, strict=False):
            new = own
            if new is None or new.shape != tuple(tensor.shape):
                new = spread([self.of(t) for t in request.tensors], tuple(tensor.shape))
            self._put(tensor, new)

    def _put(self, tensor: Tensor, new: Labels) -> None:
        """What is written into a tensor, in the labels of its memory."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        held = self._held.get(key)
        if held is None or held.size != tensor.itemsize:
            elements = storage.nbytes() // max(1, tensor.itemsize)
            if elements == tensor.numel():
                self._remember(tensor, new)
                return
            held = self._held[key] = _Held(blank((elements,)), tensor.itemsize, self.step)
            self._keep(storage, key)
        elif held.step is not self.step:
            self._translate(held)
        made = written(held.labels, new, tensor.stride(), tensor.storage_offset())
        self._held[key] = _Held(made, held.size, self.step)

    def _remember(self, tensor: Tensor, found: Labels, given: Any = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if given is not None and self._is_of(key, given):
            return  # a view after all
        strides = tensor.stride()
        offset = tensor.storage_offset()
        base = in_memory(found, strides) if not offset else None
        if base is None:
            base = written(blank((max(1, storage.nbytes() // max(1, tensor.itemsize)),)), found, strides, offset)
            if base.blank and not found.blank and tensor.numel():
                base = spread([found], base.shape)
        self._held[key] = _Held(base, tensor.itemsize, self.step)
        self._keep(storage, key)

    def _is_of(self, key: int, given: Any) -> bool:
        args, kwargs = given
        return any(t.untyped_storage()._cdata == key for t in _outputs((*args, *kwargs.values())))

    def _keep(self, storage: Any, key: int) -> None:
        """Keeps the address of a storage from being used again, so that a key never lies."""
        if key not in self._weak:
            storage._weak_ref()
            self._weak.add(key)
            if len(self._weak) > self._forget_at:
                self._prune()

    def _prune(self) -> None:
        gone = [key for key in self._weak if torch.UntypedStorage._expired(key)]  # type: ignore[no-untyped-call]
        for key in gone:
            self._weak.discard(key)
            self._held.pop(key, None)
            torch.UntypedStorage._free_weak_ref(key)  # type: ignore[no-untyped-call]
        self._forget_at = 2 * len(self._weak) + 1024

    def keep(self, tensor: Tensor) -> int:
        """A name for the tensor's memory, which nothing else gets as long as this one lives."""
        storage = tensor.untyped_storage()
        self._keep(storage, storage._cdata)
        return int(storage._cdata)

    def passed(self, given: Sequence[Sequence[Tensor]], tensor: Tensor) -> None:
        """A module's output where operators are not seen: the labels of what it was `given`, or the module around it.

        An input is its measure that has the same dimensions but the last. What it depends on besides was not seen.
        """
        try:
            if self.of(tensor).position is not None:
                return
            for inputs in given:
                for one in inputs:
                    own = self.of(one)
                    if own.position is None or own.slot < 0:
                        continue
                    ids = not one.is_floating_point() and one.shape == tensor.shape[:-1]
                    if ids or (one.ndim > 1 and one.shape[:-1] == tensor.shape[:-1]):
                        self._remember(tensor, _carried_on(own, tuple(tensor.shape), ids=ids))
                        return
        except Exception as failed:  # never in the way of a forward pass
            self._fail(failed)

    def close(self) -> None:
        """Forgets everything."""
        weak, self._weak = self._weak, set()
        for key in weak:
            torch.UntypedStorage._free_weak_ref(key)  # type: ignore[no-untyped-call]
        self._held.clear()
        self._calls.clear()
        self._translated.clear()
        self._hiding.clear()

    def entry_of(self, tensor: Tensor) -> object:
        """Something that is another object as soon as the tensor's memory is written to."""
        return self._held.get(tensor.untyped_storage()._cdata)


def named(kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = (argument.name for argument in kind.func._schema.arguments)
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _outputs(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return (
            [tree]
            if type(tree) in (Tensor, nn.Parameter) and tree.layout is torch.strided and not tree.is_nested
            else []
        )
    if isinstance(tree, list | tuple):
        return [tensor for part in tree for tensor in _outputs(part)]
    return []


def _standing(own: Labels) -> Labels:
    """A constant in the place of something: it belongs where that did, and depends on nothing."""
    return labels(own.shape, own.row, own.position, own.key, slot=own.slot, key_slot=own.key_slot)


def translated(old: Labels, then: Step, now: Step) -> Labels:
    """Labels of the step `then` in terms of the step `now`."""
    slots: dict[int, tuple[int, int]] = {}  # by old slot the new one, and how far positions move

    def slot_of(slot: int) -> tuple[int, int]:
        if slot not in slots:
            stream = then.streams[slot]
            for number, other in enumerate(now.streams):
                if other.sequence is stream.sequence:
                    slots[slot] = number, stream.start - other.start
                    break
            else:
                now.streams.append(stream)
                slots[slot] = len(now.streams) - 1, 0
        return slots[slot]

    row = old.row
    made: list[tuple[Label | None, int]] = []
    for part, slot in ((old.position, old.slot), (old.key, old.key_slot)):
        if part is None or slot < 0:
            made.append((None, -1))
            continue
        new, shift = slot_of(slot)
        moved = part
        if shift:
            values = np.where(part.values == NONE, NONE, part.values + shift)
            values = np.where(values >= 0, NONE, values)  # was cut off: this step's own stand there
            moved = label(values)  # type: ignore[assignment]
        made.append((moved, new))
        stream = now.streams[new]
        if row is not None and stream.row_from is not None and stream is not then.streams[slot]:
            source = np.asarray(stream.row_from, np.int32)
            if row.values.size == source.size and np.array_equal(row.values.reshape(-1), source):
                row = label(np.arange(source.size).reshape(row.values.shape))
            elif source.size and not np.array_equal(source, np.arange(source.size)):
                row = None
    bounds: dict[int, int] = {}
    for slot, last in old.bounds:
        new, shift = slot_of(slot)
        bounds[new] = max(bounds.get(new, last + shift), last + shift)
    checks = 0
    for number, check in enumerate(then.checks):
        if old.checks >> number & 1:
            place = next((i for i, other in enumerate(now.checks) if other is check), None)
            if place is None:
                place = len(now.checks)
                now.checks.append(check)
            checks |= 1 << place
    (position, slot), (key, key_slot) = made
    return labels(
        old.shape, row, position, key, slot=slot, key_slot=key_slot, bounds=bounds, checks=checks, hidden=old.hidden
    )


def _carried_on(own: Labels, shape: tuple[int, ...], *, ids: bool) -> Labels:
    def change(values: Any) -> Any:
        if ids:
            return values[..., None]
        return values if values.shape[-1] == 1 else None

    found = changed(own, shape, change)
    bounds = dict(found.bounds)
    for part, slot in ((own.position, own.slot), (own.key, own.key_slot)):
        if part is not None:
            bounds[slot] = max(bounds.get(slot, NONE), part.high)
    return labels(shape, found.row, found.position, slot=found.slot, bounds=bounds, checks=found.checks)
