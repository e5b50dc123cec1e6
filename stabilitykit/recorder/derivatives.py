"""What one element of a gradient is in float64, of the finite gradient and operands that autograd made it of.

Autograd keeps the operands that a derivative needs until its node has run, and refuses those that were written to
since. They are read in the node's own hook and nowhere else; what was packed away by a saved-tensor hook, as inside a
checkpoint, is not unpacked a second time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stabilitykit.models.operators import CONTRACTIONS, traits
from stabilitykit.recorder.entry import Entry
from stabilitykit.recorder.origins import Origin

_MOST = 1 << 22  # elements of an operand up to which an operator is differentiated as a whole


@dataclass(frozen=True, slots=True)
class Hole:
    """The place of a tensor among an operator's arguments: its name there, its shape and where it came from."""

    name: str
    shape: tuple[int, ...]
    floating: bool
    origin: Origin


@dataclass(frozen=True, slots=True)
class Forward:
    """An operator that autograd will differentiate: its arguments without their tensors, and its results' entries.

    `func` is None where only what a module returned is known. `packed`: what autograd saved of it may not be looked at.
    `result` is the origin of its first result.
    """

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entries: dict[int, Entry]
    packed: bool
    result: Origin | None = None

    def holes(self) -> list[Hole]:
        return [one for one in (*self.args, *self.kwargs.values()) if isinstance(one, Hole) and one.floating]


@dataclass(frozen=True, slots=True)
class Element:
    """One element of a gradient in float64, and the operands of it: the incoming gradient first, then what was saved,
    each as its value or, where many were combined, the largest magnitude. `origins` are those of what was saved."""

    value: float | None
    operands: tuple[float, ...] = ()
    origins: tuple[Origin | None, ...] = ()


UNKNOWN = Element(None)


def element(
    node: Any, forward: Forward | None, place: int, index: tuple[int, ...], made: Tensor, given: Tensor
) -> Element:
    """The element at `index` of `made`, the gradient of the operand number `place`, which `node` made of `given`."""
    try:
        return _element(node, forward, place, index, made.shape, given)
    except (RuntimeError, TypeError, IndexError, ValueError, AttributeError, NotImplementedError):
        return UNKNOWN  # written over since, or without a kernel for float64


def _element(
    node: Any, forward: Forward | None, place: int, index: tuple[int, ...], shape: Sequence[int], given: Tensor
) -> Element:
    name = node.name()
    if given.is_complex():
        return UNKNOWN
    if name.startswith("ToCopyBackward"):
        number = float(given[index])
        return Element(number, (number,))
    if name.startswith("ExpandBackward"):
        return _summed(_along(given, shape, index))
    if forward is None or forward.func is None:
        return UNKNOWN
    if name.startswith("EmbeddingBackward") and not forward.packed:
        return _summed(given[node._saved_indices == index[0]][:, index[1]])
    if forward.packed and any(one.startswith("_saved") for one in dir(node)):
        return UNKNOWN
    if forward.name in CONTRACTIONS:
        return _of_product(node, forward, place, index, shape, given)
    saved = {hole.name: getattr(node, f"_saved_{hole.name}", None) for hole in forward.holes()}
    result = getattr(node, "_saved_result", None)
    if traits(forward.func).pointwise:
        return _of_pointwise(forward, place, index, shape, given, saved, result)
    if forward.name in _OF_ROWS and result is not None:
        return _of_row(node, forward, index, given, result)
    return _of_whole(node, forward, place, index, given, saved)


def _summed(values: Tensor) -> Element:
    return Element(float(values.double().sum()), (_largest(values),))


def _along(tensor: Tensor, shape: Sequence[int], index: tuple[int, ...]) -> Tensor:
    """Of a tensor to which one of `shape` was broadcast, the elements that come of that at `index`."""
    extra = tensor.ndim - len(shape)
    inner = (
        i if size == tensor.shape[extra + at] else slice(None)
        for at, (i, size) in enumerate(zip(index, shape, strict=True))
    )
    return tensor[(*[slice(None)] * extra, *inner)].reshape(-1)


def _largest(values: Tensor) -> float:
    """The largest magnitude, with its sign where there is but one value."""
    if values.numel() == 1:
        return float(values)
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _of_product(
    node: Any, forward: Forward, place: int, index: tuple[int, ...], shape: Sequence[int], given: Tensor
) -> Element:
    *bias, left, right = forward.holes()
    number = place - len(bias)
    alpha, beta = (float(forward.kwargs.get(key, 1)) for key in ("alpha", "beta"))
    if number < 0:
        summed = _summed(_along(given, shape, index))
        return Element(None if summed.value is None else beta * summed.value, summed.operands)
    other = right if number == 0 else left
    held = getattr(node, f"_saved_{other.name}").detach()
    if given.ndim < 2 or held.ndim < 2:
        return UNKNOWN
    batch, (row, column) = index[:-2], index[-2:]
    if number == 0:  # of left · right: given · rightᵀ
        gradient, operand = given[batch][row], held[batch][column]
    else:  # leftᵀ · given
        gradient, operand = given[batch][:, column], held[batch][:, row]
    value = alpha * float(gradient.double() @ operand.double())
    return Element(value, (_largest(gradient), _largest(operand)), (other.origin,))


# The derivatives that autograd computes from the result, element by element.
_OF_RESULT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exp": lambda g, r: g * r,
    "exp2": lambda g, r: g * r * math.log(2),
    "expm1": lambda g, r: g * (r + 1),
    "sqrt": lambda g, r: g / (2 * r),
    "rsqrt": lambda g, r: -0.5 * g * r**3,
    "reciprocal": lambda g, r: -g * r * r,
    "sigmoid": lambda g, r: g * (1 - r) * r,
    "tanh": lambda g, r: g * (1 - r * r),
}

_LINEAR = frozenset({"add", "sub"})  # whose derivative depends on no operand

_OF_ROWS = frozenset({"softmax", "log_softmax"})


def _of_pointwise(
    forward: Forward,
    place: int,
    index: tuple[int, ...],
    shape: Sequence[int],
    given: Tensor,
    saved: dict[str, Any],
    result: Tensor | None,
) -> Element:
    incoming = _along(given, shape, index)
    wide = incoming.double()
    if result is not None and forward.name in _OF_RESULT:
        held = _along(result.detach(), shape, index)
        value = float(_OF_RESULT[forward.name](wide, held.double()).sum())
        return Element(value, (_largest(incoming), _largest(held)), (forward.result,))
    operands: dict[str, Tensor] = {}
    for hole in forward.holes():
        tensor = saved[hole.name]
        if tensor is None:  # the derivative does not depend on it
            operands[hole.name] = torch.ones_like(wide)
        else:
            operands[hole.name] = _along(tensor.detach().expand(given.shape), shape, index).double()
    gradient = _derivative(forward, operands, forward.holes()[place].name, wide)
    shown: list[tuple[float, Origin | None]] = []
    for argument in forward.args:
        if isinstance(argument, Hole) and argument.floating and saved[argument.name] is not None:
            shown.append((_largest(operands[argument.name]), argument.origin))
        elif type(argument) in (int, float) and forward.name not in _LINEAR:
            shown.append((float(argument), Origin("constant", f"{argument:g}")))
    return Element(
        float(gradient.sum()), (_largest(incoming), *(one for one, _ in shown)), tuple(origin for _, origin in shown)
    )


def _of_row(node: Any, forward: Forward, index: tuple[int, ...], given: Tensor, result: Tensor) -> Element:
    dim = int(node._saved_dim)
    dim -= 1 << 64 if dim > given.ndim else 0  # it is kept unsigned
    place = list(index)
    at = place.pop(dim)
    g, p = (tensor.detach().movedim(dim, -1)[tuple(place)] for tensor in (given, result))
    wide, row = g.double(), p.double()
    value = row * (wide - (wide * row).sum()) if forward.name == "softmax" else wide - row.exp() * wide.sum()
    return Element(float(value[at]), (_largest(g), _largest(p)), (forward.result,))


def _of_whole(
    node: Any, forward: Forward, place: int, index: tuple[int, ...], given: Tensor, saved: dict[str, Any]
) -> Element:
    if getattr(node, "_saved_result", None) is not None and all(one is None for one in saved.values()):
        return UNKNOWN  # which operand gave that result is not kept
    if forward.func.namespace != "aten" or traits(forward.func).seeded:
        return UNKNOWN
    operands: dict[str, Tensor] = {}
    for hole in (*forward.args, *forward.kwargs.values()):
        if isinstance(hole, Hole):
            held = saved.get(hole.name) if hole.floating else getattr(node, f"_saved_{hole.name}", None)
            if math.prod(hole.shape) > _MOST or (held is None and not hole.floating):
                return UNKNOWN
            if hole.floating:
                held = torch.zeros(hole.shape, dtype=torch.float64) if held is None else held.detach().double()
            assert held is not None
            operands[hole.name] = held.to(given.device)
    gradient = _derivative(forward, operands, forward.holes()[place].name, given.double())
    shown = [hole for hole in forward.holes() if saved[hole.name] is not None]
    return Element(
        float(gradient[index]),
        (_largest(given), *(_largest(saved[hole.name]) for hole in shown)),
        tuple(hole.origin for hole in shown),
    )


def _derivative(forward: Forward, operands: dict[str, Tensor], name: str, given: Tensor) -> Tensor:
    """The gradient of the operand of this name, of the operator on operands in float64."""
    leaf = operands[name].clone().requires_grad_()
    tensors = operands | {name: leaf}

    def put(argument: Any) -> Any:
        if isinstance(argument, Hole):
            return tensors[argument.name].clone()  # which the operator may write to
        return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument

    with torch.enable_grad():
        out = forward.func(*tree_map(put, forward.args), **tree_map(put, forward.kwargs))
        first = out[0] if isinstance(out, tuple | list) else out
        (gradient,) = torch.autograd.grad(first, leaf, given)
    return gradient
