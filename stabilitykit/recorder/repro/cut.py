"""The fewest operands with which an operator still does the same, found by leaving out more and more of them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stabilitykit.recorder.repro.axes import Axis, at_element, axes_of
from stabilitykit.recorder.repro.operation import Holds, Operation

_TRIES = 512  # of one axis: a sum of which every term is needed is not tried term by term where it has many

_CHECKED = frozenset("_softmax _log_softmax native_layer_norm convolution cat stack addmv addbmm addr dist".split())
"""Operators that raise where what they are given does not fit together, beside the public ones of a single tensor."""

_SIZES = frozenset({"normalized_shape"})
"""Arguments that repeat the size of an operand, by their names in operators' schemas."""


def cut(operation: Operation, holds: Holds) -> Operation:
    """`operation` with the fewest operands found for which `holds`, which is asked of nothing that raises.

    First all is left out that does not go into the element that is looked at, where shapes tell what that is. Then each
    axis is cut by halves, quarters and so on down to single places, as long as `holds`; of a product's terms the
    largest are kept, as few as hold. Of operators whose axes are not
    known every dimension is tried, alone and together with others of its size, unless the operator's kernel trusts
    that what it is given fits together: then all is kept.
    """
    one = at_element(operation)
    if one is not None and does(one, holds):
        operation = one
    known = axes_of(operation)
    if known is not None:
        for axis in known:
            largest = _largest_terms(operation, axis, holds)
            operation = _shrunk(operation, axis, holds) if largest is None else largest
        return operation
    if not _is_checked(operation):
        return operation
    for name in operation.tensors:
        for dim in range(operation.tensors[name].ndim):
            for axis in _guesses(operation, name, dim):
                operation = _shrunk(operation, axis, holds)
    return operation


def does(operation: Operation, holds: Holds) -> bool:
    """Whether `holds`, False where the operator does not take these operands."""
    try:
        return holds(operation)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return False


def _is_checked(operation: Operation) -> bool:
    """Whether the operator raises where its arguments do not fit; others may read past the end of a tensor."""
    name = operation.func._schema.name.partition("::")[2]
    return name in _CHECKED or (len(operation.tensors) == 1 and not name.startswith(("_", "native_")))


def _guesses(operation: Operation, name: str, dim: int) -> Iterator[Axis]:
    """Dimensions that may belong together with this one: of its size, and in the same place of their tensors or not."""
    tensors = operation.tensors
    size, back = tensors[name].shape[dim], tensors[name].ndim - dim
    alike = [(one, d) for one, tensor in tensors.items() for d in range(tensor.ndim) if tensor.shape[d] == size]
    groups = [
        [(name, dim)],
        *([(name, dim), other] for other in alike if other[0] != name),
        [(one, d) for one, d in alike if tensors[one].ndim - d == back],
        [(one, d) for one, d in alike if d == dim],
        alike,
    ]
    seen = set()
    for group in groups:
        places = tuple(sorted(group))
        if places not in seen:
            seen.add(places)
            yield Axis(places)


def _largest_terms(operation: Operation, axis: Axis, holds: Holds) -> Operation | None:
    """With the largest of the terms that are summed along the axis, of the sum's own sign; None where none of them
    hold, and where two operands do not make one element.
    """
    if axis.at is not None or len(axis.places) != 2:
        return None
    left, right = (operation.tensors[name].flatten().double() for name, _ in axis.places)
    if len(left) != len(right) or len(left) != operation.tensors[axis.places[0][0]].shape[axis.places[0][1]]:
        return None
    terms = left * right
    order = (terms * terms.sum().sign()).argsort(descending=True).tolist()

    def first(most: int) -> Operation:
        return _with(operation, axis, sorted(order[:most]))

    low, high = 0, 1
    while not does(first(high), holds):
        if high == len(order):
            return None
        low, high = high, min(2 * high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if does(first(middle), holds) else (middle, high)
    return first(high)


def _shrunk(operation: Operation, axis: Axis, holds: Holds) -> Operation:
    """With as few places of this axis as hold, in their order."""
    sizes = {operation.tensors[name].shape[dim] for name, dim in axis.places}
    if len(sizes) != 1:
        return operation  # an axis that was cut before is a part of this guess
    (size,) = sizes
    kept, part, tries = list(range(size)), (size + 1) // 2, 0
    while part and len(kept) > 1:
        start = 0
        while start < len(kept) and tries < _TRIES:
            fewer = kept[:start] + kept[start + part :]
            tries += 1
            if fewer and does(_with(operation, axis, fewer), holds):
                kept = fewer
            else:
                start += part
        if part == (size + 1) // 2 and len(kept) == size and not _runs(_with(operation, axis, kept[:part])):
            break  # these dimensions do not belong together
        part //= 2
    return operation if len(kept) == size else _with(operation, axis, kept)


def _runs(operation: Operation) -> bool:
    return does(operation, lambda one: bool(one.outputs()))


def _with(operation: Operation, axis: Axis, kept: Sequence[int]) -> Operation:
    """With these places of an axis alone, and what repeats its size among the arguments."""
    tensors: dict[str, Tensor] = dict(operation.tensors)
    size = 0
    for name, dim in axis.places:
        size = tensors[name].shape[dim]
        tensors[name] = tensors[name].index_select(dim, torch.tensor(kept, device=tensors[name].device))
    names = [argument.name for argument in operation.func._schema.arguments]

    def resized(name: str, value: Any) -> Any:
        if name not in _SIZES:
            return value
        one = [len(kept) if number == size else number for number in (value if isinstance(value, list) else [value])]
        return one if isinstance(value, list) else one[0]

    return replace(
        operation.on(tensors),
        args=tuple(resized(name, value) for name, value in zip(names, operation.args, strict=False)),
        kwargs={name: resized(name, value) for name, value in operation.kwargs.items()},
    )
