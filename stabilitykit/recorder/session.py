"""One recorded block: the steps and tokens of the model, its modules' outputs and its operators' results."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from stabilitykit.models.operators import SELECTIONS, OperatorMode, Traits
from stabilitykit.recorder.attention import FUSED_ATTENTION, recompute_softmax
from stabilitykit.recorder.custom import CustomStatistics
from stabilitykit.recorder.masks import Call, Operand, blocks
from stabilitykit.recorder.names import Frame, Names
from stabilitykit.recorder.observe import Observer, Options
from stabilitykit.recorder.origins import Origin
from stabilitykit.recorder.pending import Pending, Row
from stabilitykit.recorder.places.steps import Steps, tensors_of
from stabilitykit.recorder.places.track import Tracker
from stabilitykit.recorder.tensors import aside, floating, floating_of_call, has_elements, is_here, region


class StopAtBreak(Exception):  # noqa: N818  no error: the first break has been seen
    """Ends a recorded block early."""


class Session:
    """One recorded block: `starts` are the positions at which its steps begin, `steps` what entered in them.

    `autocast` is the dtype that autocasting was to, if it was on.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.options = options
        self.pending = Pending()
        self.names = Names(model, masks=True, later=self.pending.do)
        self.places = Tracker()
        self.steps = Steps(self.places)
        self.observer = Observer(
            options=options,
            origins=self.names.origins,
            places=self.places,
            pending=self.pending,
            custom=CustomStatistics(options.statistics, self.pending),
        )
        self.starts: list[int] = []
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
        self.names.attach(stack, only=only, entered=self._entered, left=self._left)
        if self.options.level == "operators":
            stack.enter_context(OperatorMode(self._run_operator))

    # Modules

    def _entered(self, frame: Frame) -> None:
        observer = self.observer
        if self.options.stop_at_break and observer.broken:
            raise StopAtBreak  # not at the break: the modules it ends return first, and lend it their names
        frame.first_entry = len(observer.entries)
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
        if self._begins(frame):
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
        for tensor in floating((args, kwargs)):
            if self.names.origins.of(tensor).kind == "constant":  # made inside the block
                self.names.origins.remember(tensor, Origin("input", "input"))

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
        call = Call("module", self._inputs(frame) if frame.inputs is None else frame.inputs)
        self.observer.observe(call, tensor, frame, site, repeats=repeats)  # what hides, only operators tell

    # Operators

    def _run_operator(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        func = kind.func
        seen_args, seen_kwargs = args, kwargs
        tensors = given = floating_of_call(args, kwargs)
        if kind.writes_in_place:
            if self.pending:
                for place, name in kind.written:
                    written = args[place] if place < len(args) else kwargs.get(name)
                    for tensor in floating(written):
                        self.pending.about_to_write(tensor)
            if kind.combines:  # what it combines is about to be written over
                seen_args, seen_kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
                tensors = floating_of_call(seen_args, seen_kwargs)
        names = self.names
        of = names.origins.of
        if tensors is given:
            operands = [Operand(tensor, of(tensor)) for tensor in given]
        else:
            operands = [Operand(tensor, of(one)) for tensor, one in zip(tensors, given, strict=True)]
        output = func(*args, **kwargs)
        placed = self.places.result(kind, args, kwargs, output)
        outputs = floating(output)
        if not outputs:
            return output
        site = names.of_result(kind, operands, outputs)
        if site is None:
            return output
        overwritten: Origin | None = None
        if kind.name == "cast" and kind.writes_in_place:  # what stood there before is no operand
            overwritten = operands.pop(0).origin
        hides = kind.name in SELECTIONS
        for operand in operands:
            hides = hides or operand.origin.may_hide
        call = Call(kind.name, operands, func, seen_args, seen_kwargs)
        fused = kind.name == FUSED_ATTENTION
        observer, frame = self.observer, names.frames[-1]
        for i, tensor in enumerate(outputs[:1] if fused else outputs):  # the rest is the kernel's own bookkeeping
            labels = placed[i] if len(placed) == len(outputs) else None
            observer.observe(call, tensor, frame, f"{site}[{i}]" if i else site, hides=hides, labels=labels)
        if overwritten is not None:
            names.also_lost(of(outputs[0]), [overwritten])  # elsewhere in that memory
        if fused and self.options.fused_softmax:
            with aside():
                observer.entries[-1].softmax = recompute_softmax(func, args, kwargs)
        return output


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
