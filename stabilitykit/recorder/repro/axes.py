"""Which dimensions of an operator's operands belong together, where that is known: those are cut alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stabilitykit.models.operators import traits
from stabilitykit.recorder.attention import FUSED_ATTENTION
from stabilitykit.recorder.repro.operation import Operation, Slot


@dataclass(frozen=True, slots=True)
class Axis:
    """Dimensions of operands, by name and number, and the place of the element that is looked at in all of them.

    `at` is None where the operator combines all places into that element.
    """

    places: tuple[tuple[str, int], ...]
    at: int | None = None


_PRODUCTS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {  # by schema: dimensions of left and right from the end
    "mm": ("mk", "kn"),
    "bmm": ("bmk", "bkn"),
    "addmm": ("mk", "kn"),
    "baddbmm": ("bmk", "bkn"),
    "mv": ("mk", "k"),
    "dot": ("k", "k"),
}


def axes_of(operation: Operation) -> list[Axis] | None:
    """The axes of a pointwise operator, a selection, a matrix product or fused attention.

    None for others, or where shapes tell none.
    """
    name = operation.func._schema.name.partition("::")[2].rstrip("_")
    slots = [*operation.args, *operation.kwargs.values()]
    if any(isinstance(one, list) and any(isinstance(inner, Slot) for inner in one) for one in slots):
        return None
    if traits(operation.func).pointwise or name in ("where", "masked_fill"):
        return _of_pointwise(operation)
    if name == "linear":
        return _of_linear(operation)
    if operation.operator == FUSED_ATTENTION:
        return _of_attention(operation)
    return _of_product(operation, *_PRODUCTS[name]) if name in _PRODUCTS else None


def at_element(operation: Operation) -> Operation | None:
    """What the element that is looked at is made of, as views; None where that is not known."""
    if operation.func is torch.ops.aten.embedding.default:
        return _of_lookup(operation)
    axes = axes_of(operation)
    if axes is None:
        return None
    tensors = dict(operation.tensors)
    for axis in axes:
        if axis.at is not None:
            for name, dim in axis.places:
                tensors[name] = tensors[name].narrow(dim, axis.at, 1)
    return replace(operation.on(tensors), index=(0,) * len(operation.index), shape=(1,) * len(operation.shape))


def _of_pointwise(operation: Operation) -> list[Axis] | None:
    tensors = operation.tensors
    try:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors.values()))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    if len(operation.index) < len(shape):
        return None
    return _aligned(tensors, shape, operation.index)


def _aligned(tensors: Mapping[str, Tensor], shape: Sequence[int], index: Sequence[int]) -> list[Axis]:
    """Broadcast against a result of this shape: dimensions are counted from the last."""
    axes = []
    for at, (size, i) in enumerate(zip(shape, index, strict=False)):
        back = len(shape) - at
        places = [(name, t.ndim - back) for name, t in tensors.items() if t.ndim >= back and t.shape[-back] == size]
        if size > 1 and places:
            axes.append(Axis(tuple(places), i))
    return axes


def _of_product(operation: Operation, left: Sequence[str], right: Sequence[str]) -> list[Axis]:
    *bias, first, second = operation.tensors
    result = [letter for letter in "bmn" if letter in left or letter in right]
    axes = _aligned({name: operation.tensors[name] for name in bias}, operation.shape, operation.index)
    of_bias = {place: axis.at for axis in axes for place in axis.places}
    found = []
    for letter in "bmnk":
        places = [(first, d) for d, one in enumerate(left) if one == letter]
        places += [(second, d) for d, one in enumerate(right) if one == letter]
        if not places or operation.tensors[places[0][0]].shape[places[0][1]] < 2:
            continue
        if letter == "k":
            found.append(Axis(tuple(places)))
            continue
        back = len(result) - result.index(letter)
        places += [(name, dim) for name, dim in of_bias if operation.tensors[name].ndim - dim == back]
        found.append(Axis(tuple(places), operation.index[result.index(letter)]))
    return found


def _of_linear(operation: Operation) -> list[Axis] | None:
    x, weight, *bias = operation.tensors
    given, held = operation.tensors[x], operation.tensors[weight]
    if held.ndim != 2:
        return None
    axes = [Axis(((x, d),), operation.index[d]) for d in range(given.ndim - 1) if given.shape[d] > 1]
    if held.shape[0] > 1:
        axes.append(Axis(((weight, 0), *((name, 0) for name in bias)), operation.index[-1]))
    return [*axes, Axis(((x, given.ndim - 1), (weight, 1)))]


def _of_attention(operation: Operation) -> list[Axis] | None:
    """Rows, heads, queries [B, H, L, E] and the keys [B, H, S, E] that a query's result combines."""
    tensors, index = operation.tensors, operation.index
    if list(tensors)[:3] != ["query", "key", "value"] or any(tensors[n].ndim != 4 for n in ("query", "key", "value")):
        return None
    query, key = tensors["query"], tensors["key"]
    masks = [name for name in tensors if name not in ("query", "key", "value")]
    names = [argument.name for argument in operation.func._schema.arguments]
    given = dict(zip(names, operation.args, strict=False)) | operation.kwargs
    if given.get("is_causal") or any(tensors[name].ndim > 4 for name in masks):
        parts = [(0, "qkv"), (1, "qkv")]  # a query's place says which keys it sees
    else:
        parts = [(0, "qkv"), (1, "qkv"), (2, "q"), (2, "kv")]
    found = []
    for dim, of in parts:
        size = (query if "q" in of else key).shape[dim]
        places = [(name, dim) for name in ("query", "key", "value") if name[0] in of]
        if size < 2 or any(tensors[name].shape[dim] != size for name, _ in places):
            continue  # several heads of queries may share one of keys
        back = 1 if of == "kv" else 4 - dim
        places += [
            (n, tensors[n].ndim - back) for n in masks if tensors[n].ndim >= back and tensors[n].shape[-back] > 1
        ]
        found.append(Axis(tuple(places), None if of == "kv" else index[dim]))
    return found


def _of_lookup(operation: Operation) -> Operation | None:
    """The row of a table that was looked up."""
    if [type(one) for one in operation.args[:2]] != [Slot, Slot]:
        return None
    weight, indices = (operation.tensors[one.name] for one in operation.args[:2])
    row = int(indices[operation.index[:-1]])
    at = operation.index[-1]
    if not 0 <= row < weight.shape[0]:
        return None
    tensors = {
        operation.args[0].name: weight[row : row + 1, at : at + 1],
        operation.args[1].name: indices.new_zeros((1,) * indices.ndim),
    }
    return replace(
        operation.on(tensors),
        args=operation.args[:2],
        kwargs={},
        index=(0,) * len(operation.index),
        shape=(1,) * len(operation.shape),
    )
