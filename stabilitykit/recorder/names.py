"""Sites: a place in the forward pass is named after the module that runs, the operator, and its number there.

`Names` follows a model through hooks and tells the site of every operator's result and where its values come from. The
recorder and lighter observers share it, so a site means the same to both.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.models.operators import Traits, moves
from stabilitykit.recorder.blocks import QueryBlock
from stabilitykit.recorder.contributions import placed
from stabilitykit.recorder.hooks import ModuleHooks
from stabilitykit.recorder.masks import Operand, blocks, narrowest
from stabilitykit.recorder.origins import Mask, Origin, Origins, Role, hidden
from stabilitykit.recorder.roles import is_norm, role_of_module
from stabilitykit.recorder.tensors import (
    aside,
    floating,
    floating_of_call,
    has_storage,
    is_here,
    is_view_of,
    measurable,
)
from stabilitykit.recorder.unseen import Unseen
from stabilitykit.records import OriginKind, Record, Recording

OUTSIDE = "outside"  # where operators stand that no part of the model runs
FIXED: frozenset[OriginKind] = frozenset({"constant", "buffer"})  # what operators make of these alone has no record
CONSTANT = "constant_"  # what the name of an operator begins with that has a record all the same: it is not finite
_LEAVES = 4  # of what was put together from more than that, the first are remembered

_WRAPPERS = re.compile(r"^(base_model\.(model\.)?)?(model\.)?")  # of peft, and of others' models with a head


def site_path(name: str) -> str:
    """The path of a module or parameter as sites use it: without the wrappers around the text model."""
    name = _WRAPPERS.sub("", f"{name}.")
    return name.removesuffix(".")


@dataclass(slots=True)
class Frame:
    """A module that is running, with its arguments.

    `numbers` count its operators by name. `block` is what it computes of its attention now, `numbers_before` what they
    were when it began with the first one, `of_blocks` the numbers of the entries that its blocks share, by site. A
    recorder that sees no operators keeps the `inputs`; `first_entry` is how many entries it had before. `role` is what
    attention uses the module's output for, `given` what a norm is given.
    """

    path: str
    module: nn.Module | None
    by_blocks: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    first_entry: int = 0
    role: Role | None = None
    given: Origin | None = None
    inputs: list[Operand] | None = None
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


class Names:
    """Follows which modules of `model` run, and where the values of every tensor come from.

    `masks`: also follow which elements a mask hides when values are moved. `later` runs an action once the statistics
    that are still on their way from a device have arrived. `unseen` is what tensors are that nobody was told of.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        masks: bool = False,
        later: Callable[[Callable[[], None]], None] = lambda action: action(),
        unseen: OriginKind = "outside",
    ) -> None:
        self.frames = [Frame(OUTSIDE, None)]
        self.origins = Origins(
            weights=lambda: ((site_path(name), held) for name, held in model.named_parameters() if has_storage(held)),
            buffers=((site_path(name), tensor) for name, tensor in model.named_buffers() if has_storage(tensor)),
            unseen=unseen,
        )
        self._model = model
        self._modules = [(site_path(name), module) for name, module in model.named_modules()]
        self._masks = masks
        self._later = later

    def attach(
        self,
        stack: ExitStack,
        *,
        only: Callable[[str], bool] = lambda path: True,
        entered: Callable[[Frame], None] | None = None,
        left: Callable[[Frame, Any], None] | None = None,
        unseen: Unseen | None = None,
    ) -> None:
        """Follows the modules whose paths `only` accepts, until the end of `stack`, in this thread.

        `entered` is called when one begins, `left` when it has ended, with what it returns: None if it raised. Where
        there is `unseen`, what they raise becomes a note. What runs inside a backward pass, as checkpointed modules do
        again, is not followed.
        """
        frames, thread, in_backward = self.frames, get_ident(), torch._C._current_graph_task_id  # -1: in none

        def failed(path: str, error: Exception) -> None:
            if unseen is None:
                raise error
            unseen.failed(
                f"what {f'the module {path}' if path else 'the model'} is given or returns", error, "a module"
            )

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not frames or get_ident() != thread or in_backward() != -1:
                return
            if frames[-1].module is not module:
                if all(frame.module is not module for frame in frames):
                    return  # never entered: somebody else's hook raised before ours
                while frames[-1].module is not module:  # they ended without their hooks
                    frames.pop()
            frame = frames.pop()
            if left is not None:
                try:
                    left(frame, output)
                except Exception as error:
                    failed(frame.path, error)

        def entering(path: str, followed: nn.Module) -> Callable[..., None]:
            by_blocks = hasattr(type(followed), "query_block")
            role, norm = role_of_module(path), is_norm(path)

            def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if module is not followed or get_ident() != thread or in_backward() != -1:  # a copy has its hooks too
                    return
                frame = Frame(path, module, by_blocks, args=args, kwargs=kwargs, role=role)
                if norm and args and isinstance(args[0], Tensor):
                    frame.given = self.origins.of(args[0])
                frames.append(frame)
                if entered is not None:
                    try:
                        entered(frame)
                    except Exception as error:
                        failed(path, error)

            return enter

        hooks = ModuleHooks(self._model, stack)
        for path, module in self._modules:
            if only(path):
                hooks.attach(module, entering(path, module), leave)

    def of_operator(self, kind: Traits, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> str | None:
        """The site of the result of an operator that is not a view; None for results that have no record: values that
        were only moved, and constants.
        """
        outputs = floating(output)
        if not outputs:
            return None
        operands = [Operand(tensor, self.origins.of(tensor)) for tensor in floating_of_call(args, kwargs)]
        site = self.of_result(kind, args, kwargs, operands, outputs)
        if site is not None:
            made = Origin("computed", site)
            for tensor in outputs:
                self.origins.remember(tensor, made)
        return site

    def of_result(
        self,
        kind: Traits,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        operands: Sequence[Operand],
        outputs: Sequence[Tensor],
    ) -> str | None:
        """As `of_operator`, given the floating operands and at least one floating result. Where it returns a site, the
        caller remembers the origin of the result.
        """
        if moves(kind, operands[-1].tensor if operands else None, outputs[0], args, kwargs):
            self._move(kind, args, kwargs, operands, outputs)
            return None
        if not kind.factory:
            for operand in operands:
                if operand.origin.kind not in FIXED:
                    return self.frames[-1].site(kind.name)
        for tensor in outputs:
            self.origins.remember(tensor, Origin("constant", kind.name))
        return None

    def same(self, tensor: Tensor, other: Tensor) -> Tensor:
        """`tensor`, with the origin of `other`."""
        self.origins.remember(tensor, self.origins.of(other))
        return tensor

    def also_lost(self, origin: Origin, others: Sequence[Origin]) -> None:
        """If one of `others` is not finite, neither is `origin`, for the same reason."""
        leaves = [leaf for other in others for leaf in other.leaves or (() if other.kind == "computed" else (other,))]
        origin.leaves = tuple(dict.fromkeys(leaves))[:_LEAVES]

        def tell() -> None:
            for other in others:
                origin.lost = origin.lost or (other.lost and other.kind == "computed")
                origin.trail = origin.trail or other.trail

        self._later(tell)

    def look(self, operand: Operand) -> None:
        """Whether something that was not computed holds NaN or +inf, once for all of it: -inf may be a mask's."""
        origin, tensor = operand.origin, operand.tensor
        if (
            origin.kind not in ("computed", "weight")
            and not origin.looked_at
            and is_here(tensor)
            and not tensor.is_meta
        ):
            origin.looked_at = True
            with aside():
                origin.lost = origin.lost or bool((tensor.isnan() | (tensor == math.inf)).any())

    def _move(
        self,
        kind: Traits,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        operands: Sequence[Operand],
        outputs: Sequence[Tensor],
    ) -> None:
        """The result has the origin of its operand, or is a constant where no operand is floating."""
        origins = [operand.origin for operand in operands]
        mixed = False
        for origin in origins:
            mixed = mixed or origin is not origins[0]
        if mixed and len({id(origin) for origin in origins if origin.kind != "computed"}) > 1:  # whose fault it was
            for operand in operands[kind.writes_in_place :]:
                self.look(operand)
        number = placed(args, kwargs)
        put_in = [] if number is None or number == -math.inf else [Origin("constant", f"{number:g}", lost=True)]
        if kind.writes_in_place:
            # blocks that are put together are the record that they share
            computed = put_in or any(origin.kind not in FIXED for origin in origins)
            entry = origins[-1].entry if origins and computed and self.frames[-1].block is not None else None
            for tensor in outputs:
                name = origins[-1].name if entry is not None else kind.name
                origin = Origin("computed" if computed else "constant", name, entry)
                self.also_lost(origin, [*origins, *put_in])
                self.origins.remember(tensor, origin)
            return
        hides = False
        if self._masks and any(origin.may_hide for origin in origins):
            with aside():
                hides = any(operand.hides() is not None for operand in operands)
        for tensor in outputs:
            if operands and not put_in and is_view_of(tensor, operands[0].tensor):
                continue  # a view shares its memory's origin
            if not origins or kind.name in ("lift", "lift_fresh"):
                origin = Origin("constant", kind.name)
            elif not mixed and not put_in:
                origin = origins[0]
            else:
                fixed = all(origin.kind in FIXED for origin in origins)
                role = origins[0].role if all(origin.role == origins[0].role for origin in origins) else None
                origin = Origin("constant" if fixed else "computed", kind.name, role=role)
                self.also_lost(origin, [*origins, *put_in])
            if hides:  # elements moved, and the mask with them
                with aside():
                    where = blocks(measurable(tensor), narrowest(tensor, operands))
                    moved = hidden(where, tensor.stride())
                mask = next((o.mask for o in origins if o.mask is not None), None)
                moved_from, origin = origin, replace(origin, masked=moved, hidden=None, mask=mask or Mask())
                self.also_lost(origin, [moved_from])
            self.origins.remember(tensor, origin)
