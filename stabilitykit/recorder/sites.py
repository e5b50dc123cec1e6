"""What a place in the forward pass is called: by the module that is running, the operator, and which of its name.

`Frame` counts; the recorder asks it for every name. `Sites` is for observers that measure nothing: it follows a model
by hooks and tells of each operator's result the name that a record of it has.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from stabilitykit.recorder.blocks import QueryBlock
from stabilitykit.recorder.operators import Traits, moves
from stabilitykit.recorder.origins import Origin, Origins
from stabilitykit.recorder.tensors import floating, floating_of_call, is_view_of
from stabilitykit.records import Record, Recording

OUTSIDE = "outside"  # where operators stand that no part of the model runs

_WRAPPERS = re.compile(
    r"^(base_model\.(model\.)?)?(model\.)?"
)  # of peft, and of transformers' and gemma_pytorch's heads


def site_path(name: str) -> str:
    """A module's or parameter's path as sites have it: without what wraps the text model it belongs to."""
    name = _WRAPPERS.sub("", f"{name}.")
    return name.removesuffix(".")


@dataclass(slots=True)
class Frame:
    """A module that is being executed.

    `numbers` count its operators by name. `block` is what it computes of its attention now, `numbers_before` what they
    were when it began with the first one, `of_blocks` the numbers of the entries that its blocks share, by site.
    """

    path: str
    module: nn.Module | None
    by_blocks: bool = False
    numbers: dict[str, int] = field(default_factory=dict)
    block: QueryBlock | None = None
    numbers_before: dict[str, int] | None = None
    of_blocks: dict[str, int] | None = None

    def site(self, operator: str) -> str:
        """The name of the operator that runs now, which is counted."""
        if self.by_blocks:
            block = self.module.query_block  # type: ignore[union-attr]
            if block is not self.block:
                self._turn_to(block)  # type: ignore[arg-type]
        number = self.numbers.get(operator, 0)
        self.numbers[operator] = number + 1
        return f"{self.path}/{operator}.{number}"

    def _turn_to(self, block: QueryBlock | None) -> None:
        """Operators have the same numbers in every block, and go on from there after the last one."""
        if block is not None:
            if self.block is None or self.numbers_before is None:
                self.numbers_before, self.of_blocks = dict(self.numbers), {}
            self.numbers = dict(self.numbers_before)
        self.block = block


def computes_by_blocks(module: nn.Module) -> bool:
    return hasattr(type(module), "query_block")


def by_operator(recording: Recording) -> Iterator[tuple[str, Record]]:
    """The records of a first step that operators made, under the operators' own names: what a module returns is
    recorded under the module's.
    """
    ran: dict[str, Counter[str]] = {}  # by module, the operators of its present run
    returned: set[str] = set()  # modules whose output has been seen, so that they may run again
    for record in recording:
        module, operator = record.module, record.operator
        if record.step > 0 or operator is None or record.site.endswith("]"):
            continue
        numbers = ran.setdefault(module, Counter())
        own = "/" in record.site
        if module in returned and (not own or record.site != f"{module}/{operator}.{numbers[operator]}"):
            numbers.clear()  # it runs again
            returned.remove(module)
        yield record.site if own else f"{module}/{operator}.{numbers[operator]}", record
        numbers[operator] += 1
        if not own:
            returned.add(module)


class Sites:
    """Follows `model` between `attach` and the end of its stack."""

    def __init__(self, model: nn.Module) -> None:
        self._frames = [Frame(OUTSIDE, None)]
        self._origins = Origins(
            weights=lambda: ((site_path(name), tensor) for name, tensor in model.named_parameters()),
            constants=((site_path(name), tensor) for name, tensor in model.named_buffers()),
        )
        self._modules = [(site_path(name), module) for name, module in model.named_modules()]

    def attach(self, stack: ExitStack) -> None:
        for path, module in self._modules:
            stack.callback(module.register_forward_pre_hook(self._enter(path)).remove)
            stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._frames.append(Frame(path, module, computes_by_blocks(module)))

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._frames[-1].module is module:
            self._frames.pop()

    def of_operator(self, kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> str | None:
        """The name of what an operator that is no view has just made; None of what no record tells: values that were
        only moved, and constants.
        """
        operands = floating_of_call(args, kwargs)
        outputs = floating(output)
        if not outputs:
            return None
        origins = [self._origins.of(operand) for operand in operands]
        if moves(kind, operands[-1] if operands else None, outputs[0]):
            self._move(kind, operands, origins, outputs)
            return None
        if kind.factory or all(origin.kind == "constant" for origin in origins):
            made = Origin("constant", kind.name)
        else:
            made = Origin("computed", self._frames[-1].site(kind.name))
        for tensor in outputs:
            self._origins.remember(tensor, made)
        return None if made.kind == "constant" else made.name

    def same(self, tensor: Tensor, other: Tensor) -> Tensor:
        """`tensor`, whose values come from where those of `other` do."""
        self._origins.remember(tensor, self._origins.of(other))
        return tensor

    def _move(self, kind: Traits, operands: list[Tensor], origins: list[Origin], outputs: list[Tensor]) -> None:
        for tensor in outputs:
            if operands and not kind.writes_in_place and is_view_of(tensor, operands[0]):
                continue
            if kind.writes_in_place and all(origin.kind == "constant" for origin in origins):
                continue
            if not origins or kind.name in ("lift", "lift_fresh"):
                origin = Origin("constant", kind.name)
            elif all(other is origins[0] for other in origins):
                origin = origins[0]
            else:
                origin = Origin("computed", kind.name)
            self._origins.remember(tensor, origin)
