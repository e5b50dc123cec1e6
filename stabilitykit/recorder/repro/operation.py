"""An operator with its operands, apart from the model that called it, so that it can be run again on fewer of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stabilitykit.models.operators import traits
from stabilitykit.recorder.masks import Call, Operand
from stabilitykit.recorder.origins import Origin
from stabilitykit.recorder.tensors import floating, floating_of_call


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor among an operator's arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class Operation:
    """An operator's arguments, with a `Slot` in the place of each tensor, and the tensors by name.

    `operator` is its common name. A tensor is called as the operator's schema calls the argument, one of a list with
    its number too. `origins` tell where floating ones came from. `index` is the element of the result that is looked
    at, in the result of `shape`, number `result` of the floating ones. `device` is where it ran, and
    `elements` are as many as it was given.
    """

    operator: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]
    origins: dict[str, Origin]
    index: tuple[int, ...]
    shape: tuple[int, ...]
    device: str
    elements: int
    result: int = 0

    @classmethod
    def of(cls, call: Call, index: tuple[int, ...], shape: tuple[int, ...]) -> "Operation":
        """Of a call of an operator that `obstacle` has nothing to say about. Its tensors are not copied."""
        origins = {id(operand.tensor): operand.origin for operand in call.operands}
        tensors: dict[str, Tensor] = {}
        known: dict[str, Origin] = {}

        def slot(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                tensors[name] = value.detach()
                if id(value) in origins:  # of it nothing but what it is may outlive the block
                    known[name] = replace(origins[id(value)], made=None, hidden=None, masked=None, trail=None)
                return Slot(name)
            if isinstance(value, list | tuple):
                return [slot(f"{name}.{i}", one) for i, one in enumerate(value)]
            return value

        names = [argument.name for argument in call.func._schema.arguments]
        args = tuple(slot(name, value) for name, value in zip(names, call.args, strict=False))
        kwargs = {name: slot(name, value) for name, value in call.kwargs.items()}
        device = next((tensor.device.type for tensor in tensors.values()), "cpu")
        return cls(
            operator=call.name,
            func=call.func,
            args=args,
            kwargs=kwargs,
            tensors=tensors,
            origins=known,
            index=tuple(index),
            shape=tuple(shape),
            device=device,
            elements=sum(tensor.numel() for tensor in tensors.values()),
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def copied(self) -> "Operation":
        """With copies of its tensors in the host's memory, which nothing writes to."""
        return self.on({name: t.to("cpu", copy=True).contiguous() for name, t in self.tensors.items()})

    def on(self, tensors: Mapping[str, Tensor]) -> "Operation":
        return replace(self, tensors=dict(tensors))

    def moved(self, device: str) -> "Operation":
        return self.on({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def giving(self, result: int) -> "Operation":
        """With another one of its results looked at."""
        return replace(self, result=result)

    def in_float64(self) -> "Operation":
        """The same operator on its operands in float64, asked for results in float64."""

        def widened(value: Any) -> Any:
            return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

        args = [widened(value) for value in self.args]
        if self.operator in ("softmax", "log_softmax") and len(args) > 2:
            args[2] = False  # to float32, which half operands alone can be asked for
        kwargs = {name: widened(value) for name, value in self.kwargs.items()}
        tensors = {name: t.double() if t.is_floating_point() else t for name, t in self.tensors.items()}
        return replace(self, args=tuple(args), kwargs=kwargs, tensors=tensors)

    def call(self) -> Call:
        """The call itself, on copies where it writes into its operands."""
        writes = traits(self.func).writes_in_place
        given = {name: tensor.clone() if writes else tensor for name, tensor in self.tensors.items()}
        args, kwargs = (self.filled(tree, given) for tree in (self.args, self.kwargs))
        names = {id(tensor): name for name, tensor in given.items()}
        operands = [  # each with an origin of its own: judging it marks it
            Operand(tensor, replace(self.origins[names[id(tensor)]]))
            for tensor in floating_of_call(args, kwargs)
            if names[id(tensor)] in self.origins
        ]
        return Call(self.operator, operands, self.func, args, kwargs)

    @staticmethod
    def filled(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
        return tree_map(
            lambda leaf: tensors[leaf.name] if isinstance(leaf, Slot) else leaf,
            tree,
            is_leaf=lambda leaf: isinstance(leaf, Slot),
        )

    def outputs(self) -> list[Tensor]:
        """Its floating results, or what it writes into. Raises whatever the operator raises."""
        call = self.call()
        results = floating(call.func(*call.args, **call.kwargs))
        return results or [operand.tensor for operand in call.operands[:1]]

    def picked(self) -> str:
        """What follows the call to have the result that is looked at: "", or "[1]"."""
        call = self.call()
        results = call.func(*call.args, **call.kwargs)
        if isinstance(results, Tensor):
            return ""
        wanted = floating(results)[self.result]
        return f"[{next(i for i, one in enumerate(results) if one is wanted)}]"

    def floating(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in self.tensors.items() if name in self.origins)


def obstacle(call: Call) -> str | None:
    """Why an operator cannot be run alone, in words that follow "cannot be run alone: "; None where it can."""
    func = call.func
    if func is None:
        return "which operator made it was not seen"
    if getattr(func, "namespace", None) != "aten":
        return f"its operator, {func.name()}, is not one of torch's own"
    if traits(func).seeded and _chance(call) != 0:
        return f"its operator, {call.name}, draws random numbers"
    if not all(_is_plain(leaf) for leaf in _leaves((*call.args, *call.kwargs.values()))):
        return f"an argument of its operator, {call.name}, is neither a plain tensor nor a number"
    if any(operand.tensor.dtype is torch.complex128 for operand in call.operands):
        return "a file of safetensors holds no complex128"
    return None


def _chance(call: Call) -> Any:
    """The probability with which attention drops out, None for operators that have no such argument."""
    names = [argument.name for argument in call.func._schema.arguments]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    return given.get("dropout_p", 0.0 if "dropout_p" in names else None)


_LITERALS = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def _is_plain(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return (
            type(leaf) in (Tensor, nn.Parameter)
            and leaf.layout is torch.strided
            and not (leaf.is_nested or leaf.is_quantized)
        )
    return isinstance(leaf, _LITERALS)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, list | tuple):
        for one in tree:
            yield from _leaves(one)
    else:
        yield tree


Holds = Callable[[Operation], bool]
"""Whether an operation still does what is looked for."""
