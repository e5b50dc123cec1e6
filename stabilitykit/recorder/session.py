"""One recorded block: the steps and tokens of the model, its modules' outputs and its operators' results."""

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from stabilitykit.models.operators import SELECTIONS, Traits, WatchMode, adds_up
from stabilitykit.recorder.attention import FUSED_ATTENTION, recompute_softmax
from stabilitykit.recorder.backward import Backward
from stabilitykit.recorder.custom import CustomStatistics
from stabilitykit.recorder.gradients import Gradients
from stabilitykit.recorder.inputs import named_inputs
from stabilitykit.recorder.masks import Call, Operand, blocks, calls_of_each, show_masks
from stabilitykit.recorder.names import Frame, Names
from stabilitykit.recorder.nodes import Nodes
from stabilitykit.recorder.observe import Observer, Options
from stabilitykit.recorder.origins import Origin
from stabilitykit.recorder.pending import Pending, Row
from stabilitykit.recorder.places.steps import Steps, tensors_of
from stabilitykit.recorder.places.track import Tracker
from stabilitykit.recorder.repro.keep import Keeper
from stabilitykit.recorder.tensors import aside, floating, floating_of_call, has_elements, is_here, region
from stabilitykit.recorder.unseen import StopAtBreak, Unseen
from stabilitykit.records import OriginKind

_LEAST = frozenset("min amin argmin minimum aminmax cummin".split())


class Session:
    """One recorded block: `starts` are the positions at which its steps begin, `steps` what entered in them.

    `autocast` is the dtype that autocasting was to, if it was on.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.options = options
        self.pending = Pending()
        self.unseen = Unseen()
        unseen: OriginKind = "outside" if options.level == "operators" else "computed"
        self.names = Names(model, masks=True, later=self.pending.do, unseen=unseen)
        self.places = Tracker()
        self.steps = Steps(self.places)
        self.observer = Observer(
            options=options,
            origins=self.names.origins,
            places=self.places,
            pending=self.pending,
            custom=CustomStatistics(options.statistics, self.pending),
            keeper=Keeper() if options.keep_operands else None,
        )
        self.nodes = Nodes(model, self.observer, self.names) if options.backward else None
        self.gradients: Gradients | None = None
        if self.nodes is not None:
            self.gradients = Gradients(model, self.observer, self.names, self.nodes, self.unseen)
        self.backward = Backward(model, self.observer, self.unseen, self.gradients)
        self.starts: list[int] = []
        self._outputs: list[tuple[int, Origin]] = []
        self._raised: set[int] = set()
        self.autocast: str | None = None
        modules = dict(model.named_modules())
        # what a wrapper's `generate` may call without calling the wrapper
        self._wholes = {model} | {
            modules[outer]
            for name, module in modules.items()
            if isinstance(module, nn.ModuleList)
            for outer in _around(name)
            if not isinstance(modules[outer], nn.ModuleList)
        }

    def attach(self, stack: ExitStack) -> None:
        """Follows the model until the end of `stack`."""
        by_layers = self.options.level == "layers"
        only = _is_layer if by_layers else lambda path: True
        self.names.attach(stack, only=only, entered=self._entered, left=self._left, unseen=self.unseen)
        if self.options.level == "operators":
            stack.enter_context(WatchMode(self._before, self._after, self._failed))
        stack.enter_context(self.backward.watch())
        if self.nodes is not None:
            self.nodes.attach(stack)

    def lost_steps(self) -> set[int]:
        """The steps whose outputs are not finite, once everything has arrived."""
        entries = self.observer.entries
        lost = set(self._raised)  # what broke was the end of the pass
        for step, origin in self._outputs:
            doubt = None if origin.entry is None else entries[origin.entry].doubt
            refuted = doubt is not None and doubt.lost is not None and not doubt.mask.confirmed
            of_none = origin.of_mask and origin.mask is not None and not origin.mask.confirmed
            if origin.lost or refuted or of_none:
                lost.add(step)
        return lost

    # Modules

    def _entered(self, frame: Frame) -> None:
        observer = self.observer
        if self.options.stop_at_break and observer.broken:
            raise StopAtBreak  # not at the break: the modules it ends return first, and lend it their names
        frame.first_entry = len(observer.entries)
        self.backward.ran(frame.module)
        if frame.module in self._wholes:
            if self._begins(frame):
                with aside():
                    self._begin_step(frame)
            else:
                self.steps.part(frame.args, frame.kwargs)
        if self.options.level != "operators":
            frame.inputs = self._inputs(frame)
        elif _is_layer(frame.path):
            self._look_for_masks(frame.args, frame.kwargs)

    def _begins(self, frame: Frame) -> bool:
        """Whether a step begins with this module: no other one that holds the layers runs around it."""
        return frame.module in self._wholes and not any(
            above.module in self._wholes for above in self.names.frames if above is not frame
        )

    def _left(self, frame: Frame, output: Any) -> None:
        if self.options.level != "operators":
            with aside():
                given = [tensors_of(one.args, one.kwargs) for one in (frame, *reversed(self.names.frames[1:]))]
                for tensor in floating(output):
                    self.places.passed(given, tensor)
        if type(output) is Tensor:
            if has_elements(output):
                self._module_output(frame, 0, output)
        else:
            for index, tensor in enumerate(floating(output)):
                self._module_output(frame, index, tensor)
        if self.nodes is not None:
            for tensor in floating(output)[:1]:
                self.nodes.module(frame.path, tensor)
        if self._begins(frame):
            step = self.places.step.number
            self._outputs += [(step, self.names.origins.of(tensor)) for tensor in floating(output)]
            if output is None and sys.exc_info()[1] is not None and self.observer.broken:
                self._raised.add(step)
            self.steps.ended(frame.module, frame.args, frame.kwargs, output)
        if self.observer.judgements and len(self.names.frames) == 1:
            self.observer.settle()

    def _inputs(self, frame: Frame) -> list[Operand]:
        given = floating_of_call(frame.args, frame.kwargs)
        return [Operand(tensor, self.names.origins.of(tensor)) for tensor in given]

    def _begin_step(self, frame: Frame) -> None:
        args, kwargs = frame.args, frame.kwargs
        self.observer.begin()
        step = self.steps.begin(frame.module, args, kwargs)
        self.names.frames[0].numbers.clear()
        self.starts.append(step.start)
        devices = {tensor.device.type for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for device in devices - {"meta"}:
            if torch.is_autocast_enabled(device):
                self.autocast = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        self._name_inputs(args, kwargs)

    def _name_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What is passed to the model is an input, whoever made it, unless a record says how it was computed."""
        origins = self.names.origins
        module = self.names.frames[-1].module
        assert module is not None
        for kind, name, tensor in named_inputs(module, args, kwargs):
            origin = origins.of(tensor)
            if origin.kind == "computed" and (self.options.level == "operators" or origin.entry is not None):
                if origin.leaves and not origin.lost:
                    leaves = (
                        leaf if leaf.kind in ("weight", "buffer") else Origin(kind, name) for leaf in origin.leaves
                    )
                    origins.remember(tensor, replace(origin, leaves=tuple(leaves)))
            elif origin.kind not in ("weight", "buffer") and origin.trail is None:
                origins.remember(tensor, Origin(kind, name))
                if kind == "input" and self.options.level != "operators":  # later the model may have written to it
                    self.names.look(Operand(tensor, origins.of(tensor)))

    def _look_for_masks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Which of the constants and inputs that a device's layers are given hide nothing: known before long."""
        for tensor in floating((args, kwargs)):
            if is_here(tensor):
                continue
            origin = self.names.origins.of(tensor)
            if origin.may_mask and not origin.looked_at:
                origin.looked_at = True
                with aside():
                    found = blocks(tensor).any().double().reshape(1)

                def tell(row: Row, origin: Origin = origin) -> None:
                    origin.clear = row[0] == 0

                self.pending.after(found, tell, ())

    def _module_output(self, frame: Frame, index: int, tensor: Tensor) -> None:
        site = (frame.path or "/output") + (f"[{index}]" if index else "")
        origin = self.names.origins.of(tensor)
        memory = region(tensor)
        for one in floating_of_call(frame.args, frame.kwargs):
            if region(one) == memory:
                return  # handed on as it came
        repeats = None
        if origin.entry is not None and origin.entry >= frame.first_entry:
            entry = self.observer.entries[origin.entry]
            if self.options.level == "operators":
                if index and math.prod(entry.form.shape) == tensor.numel():
                    return  # what a module hands out besides keeps its operator's name, as where it is not handed out
                if entry.region == memory:
                    if "/" in entry.site and frame.path:  # the model itself has no path to be called by
                        self.observer.rename(entry, site, tensor)
                    return
            elif entry.region == memory:
                repeats = origin.entry  # without operators a write in between goes unseen, so the statistics decide
        given = self._inputs(frame) if frame.inputs is None else frame.inputs
        if self.options.level == "operators":
            given = [Operand(tensor, origin), *given]  # what it returns was not computed, or put together
        call = Call("module", given, module=frame.module)
        self.observer.observe(call, tensor, frame, site, repeats=repeats)  # what hides, only operators tell

    # Operators

    def _before(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The operator and its operands, as they are before it runs."""
        seen_args, seen_kwargs = args, kwargs
        tensors = given = floating_of_call(args, kwargs)
        if kind.writes_in_place:
            if self.pending:
                for tensor in _written(kind, args, kwargs):
                    self.pending.about_to_write(tensor)
            if kind.combines or adds_up(kind, args, kwargs):  # what it combines is about to be written over
                seen_args, seen_kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
                tensors = floating_of_call(seen_args, seen_kwargs)
        of = self.names.origins.of
        if tensors is given:
            operands = [Operand(tensor, of(tensor)) for tensor in given]
        else:
            operands = [Operand(tensor, of(one)) for tensor, one in zip(tensors, given, strict=True)]
        show_masks(kind.name, operands)
        if kind.name in ("nansum", *_LEAST):
            self.observer.leave_out(operands)
        if kind.name == "argmax" and self.names.frames[-1].module is None:
            self.observer.look_at_choice(operands[0])
        return Call(kind.name, operands, kind.func, seen_args, seen_kwargs)

    def _after(self, kind: Traits, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        placed = self.places.result(kind, args, kwargs, output)
        outputs = floating(output) or (_written(kind, args, kwargs) if kind.writes_in_place else [])
        if not outputs:
            return
        names, operands = self.names, call.operands
        observer, frame = self.observer, names.frames[-1]
        site = names.of_result(kind, args, kwargs, operands, outputs)
        if site is None:
            if operands or any(isinstance(argument, Tensor) for argument in args):
                for tensor in outputs:
                    origin = names.origins.of(tensor)
                    if origin.kind == "constant" and origin.trail is None and not kind.factory and not kind.places:
                        observer.look_at_constant(call, tensor, origin, frame)
            return
        overwritten: Origin | None = None
        if kind.name == "cast" and kind.writes_in_place:  # what stood there before is no operand
            overwritten = operands.pop(0).origin
        hides = kind.name in SELECTIONS
        for operand in operands:
            hides = hides or operand.origin.may_hide
        fused = kind.name in (FUSED_ATTENTION, "_ctc_loss")
        each = calls_of_each(call, len(outputs))
        for i, tensor in enumerate(outputs[:1] if fused else outputs):  # the rest is the kernel's own bookkeeping
            labels = placed[i] if len(placed) == len(outputs) else None
            observer.observe(each[i], tensor, frame, f"{site}[{i}]" if i else site, hides=hides, labels=labels)
        if self.nodes is not None:
            self.nodes.operator(kind, args, kwargs, outputs)
        if len(outputs) > 1 and not fused:  # what goes on in one result has not ended in another
            observer.join(outputs)
        if overwritten is not None:
            names.also_lost(names.origins.of(outputs[0]), [overwritten])  # elsewhere in that memory
        if kind.name == FUSED_ATTENTION and self.options.fused_softmax:
            with aside():
                observer.entries[-1].softmax = recompute_softmax(call.func, args, kwargs)

    def _failed(self, kind: Traits, error: Exception) -> None:
        frame = self.names.frames[-1]
        place = f" in {frame.path}" if frame.path and frame.module is not None else ""
        what = f"the result of {kind.name}{place}"
        self.unseen.failed(what, error, f"operator {kind.name}")


def _written(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The floating tensors that an operator writes into."""
    given = (args[place] if place < len(args) else kwargs.get(name) for place, name in kind.written)
    return [tensor for argument in given for tensor in floating(argument)]


def _around(name: str) -> Iterator[str]:
    """The names of the modules that hold the one of this name, the model's own, "", too."""
    while name:
        name = name.rpartition(".")[0]
        yield name


@cache
def _is_layer(path: str) -> bool:
    """Whether a path is the model itself, a direct child of it, or an element of its outermost list of layers."""
    parent, _, name = path.rpartition(".")
    return not parent or (name.isdigit() and not any(part.isdigit() for part in parent.split(".")))
