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
from stabilitykit.recorder.places import moves  # noqa: F401  which adds its rules
from stabilitykit.recorder.places.grids import GRIDS, convolved
from stabilitykit.recorder.places.hiding import FUSED, Hiding
from stabilitykit.recorder.places.labels import (
    NONE,
    Label,
    Labels,
    blank,
    changed,
    constant,
    labels,
    spread,
    vector,
)
from stabilitykit.recorder.places.lookup import BY_VALUE, by_indices
from stabilitykit.recorder.places.memory import in_memory, refined, view, written
from stabilitykit.recorder.places.rules import RULES, Request, pointwise, unknown
from stabilitykit.recorder.places.streams import Entering, Step, Stream
from stabilitykit.recorder.places.translate import translated
from stabilitykit.recorder.tensors import ByStorage

_REMEMBERED = 1 << 13  # calls
_FILLS = frozenset("fill zero normal uniform random exponential bernoulli geometric cauchy log_normal".split())
# Their results are views, whatever their schemas say.
_ALIASING = frozenset(
    "_unsafe_view lift lift_fresh contiguous detach alias unsafe_split unsafe_split_with_sizes unsafe_chunk".split()
)
_SIMPLE = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))


_Held = tuple[Labels, int, Step]
"""What is known of a storage: labels as of one contiguous tensor, the bytes of an element, and since which step."""


_calls: dict[tuple[Any, ...], tuple[Labels, ...]] = {}  # what operators made of what, in any recording


class Tracker:
    """Which row and position every element belongs to, from the tensors that entered the model on.

    `step` is the present one. What is not known belongs nowhere; whatever goes wrong in here, it makes things unknown
    and nothing else, and is noted in `failures`.
    """

    def __init__(self) -> None:
        self.step = Step(-1)
        self.failures: list[str] = []
        self._held: ByStorage[_Held] = ByStorage(1024)
        self._translated: dict[tuple[int, int], tuple[Labels, Step, Labels]] = {}
        self._hiding = Hiding()

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
        row, position = (
            None if dim is None else _counted(shape[dim], dim, len(shape)) for dim in (entering.row, entering.position)
        )
        found = labels(shape, row, position, slot=slot, raw=not entering.ids)
        self._remember(tensor, found)
        base = self._held[tensor.untyped_storage()._cdata][0]
        base.views[(tensor.shape, tensor.stride(), tensor.storage_offset())] = found  # rows may share their memory

    def of(self, tensor: Tensor) -> Labels:
        """The labels of a tensor, or of a view of one."""
        try:
            return self._of(tensor)
        except Exception as failed:  # never in the way of a forward pass
            self.note(failed)
            return blank(tuple(tensor.shape))

    def _of(self, tensor: Tensor) -> Labels:
        held = self._held.get(tensor.untyped_storage()._cdata)
        shape = tensor.shape
        if held is None or held[0].blank:
            return blank(shape)
        base, size, then = held
        if then is not self.step:
            base = self._translate(tensor, held)
        own = tensor.itemsize
        strides, offset = tensor.stride(), int(tensor.storage_offset())
        if own != size:
            if own % size == 0:  # complex numbers made of pairs
                parts = own // size
                strides, offset = tuple(stride * parts for stride in strides), offset * parts
            elif size % own == 0:
                base = refined(base, size // own)
            else:
                return spread([base], shape)
        found = base.views.get((shape, strides, offset))
        return view(base, tuple(shape), strides, offset) if found is None else found

    def _translate(self, tensor: Tensor, held: _Held) -> Labels:
        """Labels of an earlier step in terms of this one: positions count from where this one begins."""
        old, size, then = held
        key = id(old), id(then)
        found = self._translated.get(key)
        if found is None:
            found = self._translated[key] = (old, then, translated(old, then, self.step))
        self._held[tensor.untyped_storage()._cdata] = (found[2], size, self.step)
        return found[2]

    # Operators

    def result(self, kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Sequence[Labels]:
        """After an operator that is no view has run: the labels of its results, none where it wrote into something."""
        try:
            return self._result(kind, args, kwargs, output)
        except Exception as failed:  # never in the way of a forward pass
            self.note(failed)
            for tensor in _plain(output):
                self._remember(tensor, blank(tensor.shape))
            return ()

    def note(self, failed: Exception) -> None:
        """Something went wrong in here, which is nobody's business but a test's."""
        if len(self.failures) < 8:
            self.failures.append(f"{type(failed).__name__}: {failed}")

    def _result(self, kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Sequence[Labels]:
        # All of this runs at every operator, so that little is called from here.
        held, step, name = self._held, self.step, kind.name
        key: list[Any] = [id(kind)]
        known = False
        pairs = name == FUSED
        for argument in (*args, *kwargs, *kwargs.values()) if kwargs else args:
            what = type(argument)
            if what is Tensor:
                one = held.get(argument.untyped_storage()._cdata)
                if one is None or one[0].blank:
                    key.append(argument.shape)
                elif one[2] is step and argument.itemsize == one[1]:
                    base = one[0]
                    known = True
                    if base.key is not None:
                        pairs = True
                    key += (base, argument.shape, argument.stride(), argument.storage_offset())
                else:
                    known, pairs = self._name((argument,), key, known, pairs)
            elif what in _SIMPLE:
                key.append(argument)
            elif what is list or what is tuple:
                known, pairs = self._name(argument, key, known, pairs)
            else:
                key.append(argument.shape if isinstance(argument, Tensor) else id(argument))
        if kind.writes_in_place:
            if known or self._writes_known(kind, args, kwargs):
                self._write(kind, args, kwargs, pairs)
            return ()
        if name in _ALIASING:
            return ()
        outputs = (output,) if type(output) is Tensor else _plain(output)
        if not known:
            results: Sequence[Labels] = [blank(tensor.shape) for tensor in outputs]
        else:
            checked = 0
            if pairs and not step.newest and name in Hiding.names:
                checked = self._hiding.look(kind, named(kind, args, kwargs), self)
                key.append(checked)
            if name in BY_VALUE or name in GRIDS:
                results = self._found(kind, args, kwargs, outputs, checked)
            else:
                call = tuple(key)
                remembered = _calls.get(call)
                if remembered is None:
                    if len(_calls) > _REMEMBERED:
                        _calls.clear()
                    remembered = _calls[call] = self._found(kind, args, kwargs, outputs, checked)
                results = remembered
        for tensor, own in zip(outputs, results, strict=False):
            storage = tensor.untyped_storage()
            address = storage._cdata
            found = own.stored.get(tensor.stride())
            if found is None:
                self._remember(tensor, own)
                continue
            if address not in held:
                self._held.claim(storage)
            held[address] = found, tensor.itemsize, step
        return results

    def _name(self, given: Sequence[Any], key: list[Any], known: bool, pairs: bool) -> tuple[bool, bool]:
        """As `_result` does it, of the elements of an argument that is a list."""
        key.append(len(given))
        for one in given:
            if isinstance(one, Tensor):
                found = self._of(one)
                key.append(found)
                known = known or not found.blank
                pairs = pairs or found.key is not None
            else:
                key.append(one if type(one) in _SIMPLE else id(one))
        return known, pairs

    def _found(
        self, kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Tensor], checked: int
    ) -> tuple[Labels, ...]:
        shapes = [tuple(tensor.shape) for tensor in outputs]
        request = Request(kind, named(kind, args, kwargs), self.of, shapes, newest=self.step.newest)
        if checked:
            request.hidden, request.checks = Hiding.claim(checked)
        return tuple(
            one if one is not None and one.shape == shape else spread([self.of(t) for t in request.tensors], shape)
            for one, shape in zip(self._labels(request, outputs), shapes, strict=True)
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

    def _writes_known(self, kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether memory that a constant is written into, as an argument called by name, is that of something known."""
        return any(not self._of(tensor).blank for tensor in _written(kind, args, kwargs))

    def _write(self, kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any], pairs: bool) -> None:
        into = _written(kind, args, kwargs)
        given = named(kind, args, kwargs)
        out = {name for _, name in kind.written if name.startswith("out")}
        shapes = [tuple(tensor.shape) for tensor in into]
        request = Request(kind, {name: value for name, value in given.items() if name not in out}, self.of, shapes)
        if pairs and kind.name in Hiding.names:
            request.hidden, request.checks = Hiding.claim(self._hiding.look(kind, given, self))
        found: Sequence[Labels | None]
        if kind.name in _FILLS:
            found = [self._filled(kind, tensor) for tensor in into]
        elif kind.name.startswith("_foreach_"):
            found = [self.of(tensor) for tensor in into]
        elif kind.name == "cast":
            source = request.labels("src")
            if source is None or source.blank:
                found = [_standing(self.of(into[0]))]
            else:
                found = pointwise(Request(kind, {"src": given["src"]}, self.of, shapes))
        else:
            found = self._labels(request, into)
        for i, (tensor, shape) in enumerate(zip(into, shapes, strict=True)):
            new = found[i] if i < len(found) else None
            if new is None or new.shape != shape:
                new = spread([self.of(t) for t in request.tensors], shape)
            self._put(tensor, new)

    def _filled(self, kind: Traits, tensor: Tensor) -> Labels:
        """A constant in the place of something; memory that is emptied whole belongs nowhere."""
        whole = tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
        return blank(tensor.shape) if whole and kind.name == "zero" else _standing(self.of(tensor))

    def _put(self, tensor: Tensor, new: Labels) -> None:
        """What is written into a tensor, in the labels of its memory."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, tensor.itemsize
        held = self._held.get(address)
        if held is None or held[1] != size:
            elements = storage.nbytes() // max(1, size)
            if elements == tensor.numel():
                self._remember(tensor, new)
                return
            base = blank((elements,))
        else:
            base = held[0] if held[2] is self.step else self._translate(tensor, held)
        made = written(base, new, tensor.stride(), int(tensor.storage_offset()))
        if address not in self._held:
            self._held.claim(storage)
        self._held[address] = made, size, self.step

    def _remember(self, tensor: Tensor, found: Labels) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, tensor.itemsize
        strides, offset = tensor.stride(), int(tensor.storage_offset())
        base = None if offset else in_memory(found, strides)
        if base is None:
            base = written(blank((max(1, storage.nbytes() // max(1, size)),)), found, strides, offset)
            if base.blank and not found.blank and tensor.numel():
                base = spread([found], base.shape)
        if address not in self._held:
            self._held.claim(storage)
        self._held[address] = base, size, self.step

    def renumber(self, tensor: Tensor, rows: int) -> None:
        """Gives what a cache holds, whose rows were put in another order, the numbers that the rows have now."""
        own = self.of(tensor)
        if own.position is None or tensor.shape[0] != rows:
            return
        row = _counted(rows, 0, tensor.ndim)
        bounds = dict(own.bounds)
        found = labels(own.shape, row, own.position, slot=own.slot, bounds=bounds, checks=own.checks)
        self._put(tensor, found)

    def keep(self, tensor: Tensor) -> int:
        """A name for the tensor's memory, which nothing else gets as long as this one lives."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._remember(tensor, blank(tensor.shape))
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
            self.note(failed)

    def close(self) -> None:
        """Forgets everything."""
        self._held.release()
        self._translated.clear()
        self._hiding.clear()

    def entry_of(self, tensor: Tensor) -> object:
        """Something that is another object as soon as the tensor's memory is written to."""
        return self._held.get(tensor.untyped_storage()._cdata)


def named(kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = (argument.name for argument in kind.func._schema.arguments)
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _counted(size: int, dim: int, ndim: int) -> Label | None:
    return vector(np.arange(size, dtype=np.int32), dim, ndim) if size > 1 else constant(0, ndim)


def _written(kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for place, name in kind.written:
        found += _plain(args[place] if place < len(args) else kwargs.get(name))
    return found


def _plain(tree: Any) -> list[Tensor]:
    """The tensors in a result or an argument that have memory of their own."""
    if isinstance(tree, Tensor):
        plain = type(tree) in (Tensor, nn.Parameter) and tree.layout is torch.strided and not tree.is_nested
        return [tree] if plain else []
    if isinstance(tree, list | tuple):
        return [tensor for part in tree for tensor in _plain(part)]
    return []


def _standing(own: Labels) -> Labels:
    """A constant in the place of something: it belongs where that did, and depends on nothing."""
    return labels(own.shape, own.row, own.position, own.key, slot=own.slot, key_slot=own.key_slot)


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
