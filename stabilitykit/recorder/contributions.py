"""What one element of an operator's result was made of, and what the same operands give in float64."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stabilitykit.checkpoints.mapped import pieces
from stabilitykit.models.operators import CONTRACTIONS, traits
from stabilitykit.recorder.masks import Call, Operand

_SOFTMAX = frozenset({"softmax", "log_softmax"})


@dataclass(slots=True)
class Contribution:
    """The `values` of one operand that went into the element; a Python number has no operand."""

    operand: Operand | None
    values: Tensor

    @property
    def largest(self) -> float:
        """The largest magnitude, with its sign where there is but one value; NaN if any is; 0 for no values."""
        if self.values.numel() == 1:
            return float(self.values)
        return float(self.values.abs().max()) if self.values.numel() else 0.0

    def is_finite(self) -> bool:
        return all(bool(piece.isfinite().all()) for piece in pieces(self.values))  # a head's weight may fill the memory


def contributions(call: Call, shape: Sequence[int], index: tuple[int, ...]) -> list[Contribution]:
    """What the element at `index` of a result of this shape was made of, in the order in which a person writes it.

    Of operators that are neither pointwise, products, lookups nor softmax these are the operands as a whole. None for
    a module, and for complex numbers, which have no magnitude here.
    """
    if call.func is None or any(operand.tensor.is_complex() for operand in call.operands):
        return []
    if traits(call.func).pointwise or call.name in ("masked_fill", "where", "fill"):
        return _of_pointwise(call, shape, index)
    if call.name in CONTRACTIONS and len(call.operands) >= 2:
        return _of_product(call, index)
    if "grouped_mm" in call.name and len(call.args) > 2 and len(index) == 2:
        return _of_grouped(call, index)
    if call.name in _SOFTMAX:
        (logits, *_) = call.operands
        dim = int(call.args[1]) if len(call.args) > 1 else -1
        place = list(index)
        del place[dim]
        return [Contribution(logits, logits.tensor.movedim(dim, -1)[tuple(place)])]
    if call.name == "embedding" and len(call.operands) == 1:
        (weight,) = call.operands
        return [Contribution(weight, weight.tensor[call.args[1][index[:-1]]])]
    return [Contribution(operand, operand.tensor) for operand in call.operands]


def _of_pointwise(call: Call, shape: Sequence[int], index: tuple[int, ...]) -> list[Contribution]:
    if call.name == "where" and len(call.args) == 3:
        condition = call.args[0].expand(shape)[index]
        return list(_elements(call, [call.args[1] if bool(condition) else call.args[2]], shape, index))
    if call.name == "masked_fill":
        chosen = call.args[2] if bool(call.args[1].expand(shape)[index]) else call.args[0]
        return list(_elements(call, [chosen], shape, index))
    if call.name == "fill":
        return list(_elements(call, call.args[1:], shape, index))
    if call.name == "cast":
        written = call.func._schema.is_mutable  # copy_, of whose arguments the first is written over
        return list(_elements(call, [call.args[written]], shape, index))
    found = list(_elements(call, [*call.args, *_bounds(call)], shape, index))
    if call.name in ("add", "sub") and len(found) == 2:
        return _summands(call, found)
    return found


def _bounds(call: Call) -> list[Any]:
    return [value for name, value in call.kwargs.items() if name in ("min", "max")]


def _summands(call: Call, found: list[Contribution]) -> list[Contribution]:
    """a + alpha · b: the second one as it is added; `rsub` is b - a."""
    alpha = call.kwargs.get("alpha", 1)
    if alpha == 1 and len(call.args) > 2 and isinstance(call.args[2], int | float):
        alpha = call.args[2]
    first, second = found
    reverse = "rsub" in call.func._schema.name
    scaled = first if reverse else second
    scaled.values = scaled.values.double() * alpha
    return [second, first] if reverse else [first, second]


def _elements(
    call: Call, arguments: Sequence[Any], shape: Sequence[int], index: tuple[int, ...]
) -> Iterator[Contribution]:
    """The elements of these arguments that go into that one; of an `alpha` or a flag none."""
    for place, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            if argument.is_floating_point():
                operand = next((o for o in call.operands if o.tensor is argument), None)
                yield Contribution(operand, argument.expand(shape)[index].reshape(1))
            elif argument.dtype != torch.bool and call.name == "cast":
                yield Contribution(None, argument.expand(shape)[index].reshape(1).double())
        elif isinstance(argument, int | float) and not isinstance(argument, bool) and (place < 2 or call.name != "add"):
            yield Contribution(None, torch.tensor([float(argument)], dtype=torch.float64))


def _of_product(call: Call, index: tuple[int, ...]) -> list[Contribution]:
    operands = call.operands
    if "linear" in call.func._schema.name:
        x, weight, *bias = operands
        found = [
            Contribution(x, x.tensor[index[:-1]] if x.tensor.ndim > 1 else x.tensor),
            Contribution(weight, weight.tensor[index[-1]] if weight.tensor.ndim > 1 else weight.tensor),
        ]
    else:
        *bias, left, right = operands
        row = left.tensor[index[:-1]] if right.tensor.ndim > 1 else left.tensor[index]
        column = right.tensor[index[:-2]][:, index[-1]] if right.tensor.ndim > 1 else right.tensor
        found = [Contribution(left, row), Contribution(right, column)]
    if bias and call.kwargs.get("beta", 1) != 0:
        shape = (*bias[0].tensor.shape[:0], *[1] * (len(index) - bias[0].tensor.ndim), *bias[0].tensor.shape)
        wide = bias[0].tensor.reshape(shape)
        place = tuple(i if size > 1 else 0 for i, size in zip(index, wide.shape, strict=True))
        found.append(Contribution(bias[0], wide[place].reshape(1).abs()))
    return found


def _of_grouped(call: Call, index: tuple[int, ...]) -> list[Contribution]:
    """A product of rows with the matrix of their group: the experts of a mixture. Rows are in the groups' order."""
    rows, matrices, *_ = call.operands
    ends = next(argument for argument in (*call.args, call.kwargs.get("offs")) if _counts(argument))
    group = int((ends <= index[0]).sum())
    return [
        Contribution(rows, rows.tensor[index[0]]),
        Contribution(matrices, matrices.tensor[group][:, index[1]]),
    ]


def _counts(argument: Any) -> bool:
    return isinstance(argument, Tensor) and not argument.is_floating_point()


def in_float64(call: Call, shape: Sequence[int], index: tuple[int, ...]) -> float | None:
    """The element at `index` of the same operator on the same operands, in float64.

    None where that cannot be had: a module, an operator that draws random numbers or is somebody's own (to run it again
    would repeat what it does besides), one without a kernel for float64.
    """
    if call.func is None or traits(call.func).seeded:
        return None
    try:
        if "grouped_mm" in call.name and len(index) == 2:
            row, column = _of_grouped(call, index)
            return float(row.values.double() @ column.values.double())
        if call.func.namespace != "aten":
            return None
        if any(operand.tensor.is_complex() for operand in call.operands):
            return _element(run_wide(call), index)
        if traits(call.func).pointwise:
            one = _run(call, lambda tensor: tensor.expand(shape)[index].reshape(1))
            return float(one.reshape(-1)[0])
        if call.name in CONTRACTIONS and len(call.operands) >= 2:
            left, right, *bias = _of_product(call, index)
            alpha, beta = (float(call.kwargs.get(name, 1)) for name in ("alpha", "beta"))
            return alpha * float(left.values.double() @ right.values.double()) + beta * sum(b.largest for b in bias)
        return _element(run_wide(call), index)
    except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):  # not every kernel exists in every dtype
        return None


def run_wide(call: Call, wide: Any = None) -> Tensor:
    """The result of the operator on its operands in float64, which `wide` makes of each tensor unless given."""
    return _run(call, wide or (lambda tensor: tensor))


def _run(call: Call, part: Any) -> Tensor:
    def widen(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            argument = part(argument)
            return argument.to(torch.float64, copy=True) if argument.is_floating_point() else argument
        return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument

    args = tree_map(widen, call.args)
    if call.name in _SOFTMAX and len(args) > 2:
        args = (*args[:2], False)  # half_to_float holds for half operands only
    result = call.func(*args, **tree_map(widen, call.kwargs))
    first: Tensor = result[0] if isinstance(result, tuple | list) else result
    return first


def _element(result: Tensor, index: tuple[int, ...]) -> float:
    return float((torch.view_as_real(result) if result.is_complex() else result)[index])


def placed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
    """NaN or an infinity among a call's Python numbers: what the code itself put in. -inf last, as masks do."""
    numbers = [n for n in (*args, *kwargs.values()) if isinstance(n, float) and not math.isfinite(n)]
    return min(numbers, key=lambda number: number == -math.inf, default=None)
