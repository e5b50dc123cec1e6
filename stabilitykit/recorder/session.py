"""One recorded block: the steps and tokens of the model, its modules' outputs and its operators' results."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from stabilitykit.models.operators import SELECTIONS, Traits, WatchMode
from stabilitykit.recorder.attention import FUSED_ATTENTION, recompute_softmax
from stabilitykit.recorder.backward import Backward
from stabilitykit.recorder.custom import CustomStatistics
from stabilitykit.recorder.entry import Step
from stabilitykit.recorder.masks import Call, Operand, blocks
from stabilitykit.recorder.names import Frame, Names
from stabilitykit.recorder.observe import Observer, Options
from stabilitykit.recorder.origins import Origin
from stabilitykit.recorder.pending import Pending, Row
from stabilitykit.recorder.tensors import aside, floating, floating_of_call, has_elements, is_here, region
from stabilitykit.recorder.unseen import StopAtBreak, Unseen

_Operands = tuple[list[Operand], tuple[Any, ...], dict[str, Any]]


class Session:
    """One recorded block: `starts` are the positions at which its steps begin, `seen` the ids of all tokens.

    `autocast` is the dtype that autocasting was to, if it was on.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.options = options
        self.pending = Pending()
        self.unseen = Unseen()
        self.names = Names(model, masks=True, later=self.pending.do)
        self.observer = Observer(
            options=options,
            origins=self.names.origins,
            pending=self.pending,
            custom=CustomStatistics(options.statistics, self.pending),
        )
        self.backward = Backward(model, self.observer, self.unseen)
        self.starts: list[int] = []
        self.seen: set[int] = set()
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

    # Modules

    def _entered(self, frame: Frame) -> None:
        observer = self.observer
        if self.options.stop_at_break and observer.broken:
            raise StopAtBreak  # not at the break: the modules it ends return first, and lend it their names
        frame.first_entry = len(observer.entries)
        self.backward.ran(frame.module)
        outer = self.names.frames[:-1]
        if frame.module in self._wholes and not any(above.module in self._wholes for above in outer):
            with aside():
                self._begin_step(frame.args, frame.kwargs)
        if self.options.level != "operators":
            frame.inputs = self._inputs(frame)
        elif _is_layer(frame.path):
            self._look_for_masks(frame.args, frame.kwargs)

    def _left(self, frame: Frame, output: Any) -> None:
        if type(output) is Tensor:
            if has_elements(output):
                self._module_output(frame, 0, output)
        else:
            for index, tensor in enumerate(floating(output)):
                self._module_output(frame, index, tensor)
        if self.observer.judgements and len(self.names.frames) == 1:
            self.observer.settle()

    def _inputs(self, frame: Frame) -> list[Operand]:
        given = floating_of_call(frame.args, frame.kwargs)
        return [Operand(tensor, self.names.origins.of(tensor)) for tensor in given]

    def _begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before = self.observer.step
        step = Step(before.number + 1, _held(kwargs), before.rows, before.length)
        self.observer.begin(step)
        self.names.frames[0].numbers.clear()
        self.starts.append(step.start)
        devices = {tensor.device.type for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for device in devices - {"meta"}:
            if torch.is_autocast_enabled(device):
                self.autocast = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        tensors = [leaf for leaf in tree_leaves((kwargs.get("input_ids"), args, kwargs)) if isinstance(leaf, Tensor)]
        ids = next((t for t in tensors if t.dtype in (torch.int32, torch.int64) and t.ndim in (1, 2)), None)
        embedded = next((t for t in tensors if t.is_floating_point() and t.ndim == 3), None)
        step.tokens = before.tokens
        if ids is not None:
            ids = ids.reshape(-1, ids.shape[-1])
            step.rows, step.length = ids.shape
            new = [] if ids.is_meta else ids.tolist()
            self.seen.update(*new)
            if step.start > 0 and len(before.tokens) == len(new):
                new = [[*old, *more] for old, more in zip(before.tokens, new, strict=True)]
            step.tokens = new
        elif embedded is not None:
            step.rows, step.length = embedded.shape[:2]
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

    def _before(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Operands:
        """The operands, and the arguments as they are before an operator writes over them."""
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
        of = self.names.origins.of
        if tensors is given:
            operands = [Operand(tensor, of(tensor)) for tensor in given]
        else:
            operands = [Operand(tensor, of(one)) for tensor, one in zip(tensors, given, strict=True)]
        return operands, seen_args, seen_kwargs

    def _after(
        self, kind: Traits, state: _Operands, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        operands, seen_args, seen_kwargs = state
        outputs = floating(output)
        if not outputs:
            return
        names = self.names
        site = names.of_result(kind, operands, outputs)
        if site is None:
            return
        of = names.origins.of
        overwritten: Origin | None = None
        if kind.name == "cast" and kind.writes_in_place:  # what stood there before is no operand
            overwritten = operands.pop(0).origin
        hides = kind.name in SELECTIONS
        for operand in operands:
            hides = hides or operand.origin.may_hide
        call = Call(kind.name, operands, kind.func, seen_args, seen_kwargs)
        fused = kind.name == FUSED_ATTENTION
        observer, frame = self.observer, names.frames[-1]
        for i, tensor in enumerate(outputs[:1] if fused else outputs):  # the rest is the kernel's own bookkeeping
            observer.observe(call, tensor, frame, f"{site}[{i}]" if i else site, hides=hides)
        if overwritten is not None:
            names.also_lost(of(outputs[0]), [overwritten])  # elsewhere in that memory
        if fused and self.options.fused_softmax:
            with aside():
                observer.entries[-1].softmax = recompute_softmax(kind.func, args, kwargs)

    def _failed(self, kind: Traits, error: Exception) -> None:
        frame = self.names.frames[-1]
        place = f" in {frame.path}" if frame.path and frame.module is not None else ""
        what = f"the result of {kind.name}{place}"
        self.unseen.failed(what, error, f"operator {kind.name}")


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


def _held(kwargs: Mapping[str, Any]) -> int:
    """The number of tokens before those of this call: what its cache holds, or else where its positions begin."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    held = getattr(cache, "get_seq_length", None)
    if held is not None:
        return int(held())
    positions = kwargs.get("input_positions")  # gemma_pytorch's, beside caches that are bare tensors
    return int(positions.flatten()[0]) if isinstance(positions, Tensor) and positions.numel() else 0
