"""`record(model)`: forward hooks on every module and, between them, every operator, as one list of records.

    with record(model) as recording:
        logits = model(tokens)
    recording.first_break()

The hooks know where the program is; the operator mode sees what no module returns: residual adds, attention
scores, gate · up. A tensor is measured the moment it exists, because the next operator may write over it.
Nothing is changed: the model computes the same bits with and without a recorder, and no hook outlives the
block. On a device nothing waits: what was counted there crosses to the host while the pass goes on.
"""

import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from stabilitykit.errors import MisuseError
from stabilitykit.formats import FLOAT32, FORMATS, number_format
from stabilitykit.models import matmul as products
from stabilitykit.recorder.attention import FUSED_ATTENTION, recompute_softmax
from stabilitykit.recorder.axes import Axes, axes_of
from stabilitykit.recorder.blocks import Part, part_of
from stabilitykit.recorder.deviation import measure_deviation
from stabilitykit.recorder.entry import Entry, Form, Step
from stabilitykit.recorder.judgement import Call, Operand, blocks, joins_positions, judge, may_hide, narrowest
from stabilitykit.recorder.kernels.layout import Field, edges
from stabilitykit.recorder.labels import family_of
from stabilitykit.recorder.operators import SELECTIONS, Traits, moves, traits
from stabilitykit.recorder.origins import Hidden, Origin, Origins, hidden
from stabilitykit.recorder.pending import Pending, Row
from stabilitykit.recorder.sites import OUTSIDE, Frame, computes_by_blocks, site_path
from stabilitykit.recorder.softmax import SoftmaxTally
from stabilitykit.recorder.statistics import measurable, tally, tally_by_position
from stabilitykit.recorder.tensors import NAMES, floating, floating_of_call, has_elements, is_here, is_view_of, region
from stabilitykit.records import Header, Level, Record, Recording, flat_index, index_at

DEFAULT_FORMATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")

_MEASURED = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_MASKED, _NAN, _PLUS, _MINUS = int(Field.MASKED), int(Field.NAN), int(Field.PLUS), int(Field.MINUS)


@contextmanager
def record(
    model: nn.Module,
    *,
    level: Level = "operators",
    formats: Sequence[str] = DEFAULT_FORMATS,
    position_peaks: bool = False,
    fused_softmax: bool = True,
    stop_at_break: bool = False,
    keep: dict[str, Tensor] | None = None,
    against: Mapping[str, Tensor] | None = None,
    matmul: str | None = None,
    watch: Sequence[tuple[str, int]] = (),
    token_text: Callable[[int], str] | None = None,
    redact: bool = False,
    case: Mapping[str, Any] | None = None,
) -> Iterator[Recording]:
    """Records every forward pass of `model` inside the block; the recording is complete when the block ends.

    `level`: "layers" sees the outputs of the decoder layers and the model's direct children, "modules" those of
    every module, "operators" every operator too. `formats`: those for which exact counts are kept. `position_peaks`
    keeps each position's amax. `fused_softmax`: a fused attention kernel runs as it is and keeps no probabilities, so
    its softmax statistics are recomputed in float32 from the queries and keys it was given. `stop_at_break` ends the
    block at the first break, whatever follows in it.

    `keep` is filled with copies of the modules' outputs and the residual sums by site, last step first;
    handed to another run of the same tokens as `against`, they become its records' `deviation`. `matmul`
    computes 16-bit matrix products in the block as `stabilitykit.models.matmul` does; without it arithmetic stays as
    it is. The header says which was in force.

    On the meta device nothing is computed: such a recording says which tensors there would be, of what shape and in
    which dtype, and counts all their elements as masked.

    `watch` names single elements, by site and row-major index, whose values the header keeps as `watched`.
    `token_text` gives a token id's text; a model with a `tokenizer` that has `piece` needs none. `redact` keeps
    tokens out of the recording. `case` goes into the header as it is.

    Each call of `model`, or of a module in it that holds the layers, is a step; what runs between two of them, such as
    a sampler, belongs to the first and has sites that begin with "outside". The tokens are the argument named
    `input_ids`, or else the first integer tensor of shape [L] or [B, L]. An exception raised in the block is kept as
    the header's `error` and passed on. Functions compiled by `torch.compile` run uncompiled inside the block.

    Raises MisuseError for what is no module, for an unknown level, format or kind of products, for a model or a
    module of it that went through `torch.compile`. Warns at the end of a block in which no part of the model was
    called.
    """
    if not isinstance(model, nn.Module):
        raise MisuseError(
            f"A recorded model is a torch.nn.Module; this is of type {type(model).__name__}. Of what wraps a model, "
            "give the module in it."
        )
    if level not in get_args(Level):
        raise MisuseError(f"A level is one of {', '.join(get_args(Level))}; {level!r} is none of them.")
    for name in formats:
        number_format(name)
    if matmul is not None:
        products.check_matmul(matmul)
    if any("_orig_mod" in m._modules or m.__dict__.get("_compiled_call_impl") is not None for m in model.modules()):
        raise MisuseError(
            "A recorded model runs operator by operator; this one, or a part of it, is compiled into kernels that no "
            "hook sees. Record the model from before torch.compile, which keeps it as `_orig_mod`, or load it again if "
            "it was model.compile()."
        )
    recorder = _Recorder(
        model,
        level,
        tuple(formats),
        position_peaks=position_peaks,
        fused_softmax=fused_softmax,
        stop_at_break=stop_at_break,
        keep=keep,
        against=against or {},
        watch=watch,
    )
    recording = Recording(recorder.header(case or {}))
    error: str | None = None
    try:
        with ExitStack() as stack:
            if matmul is not None:
                stack.enter_context(products.matmul(matmul))
            recording.header = replace(recording.header, matmul=products.matmul_in_force())
            if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            recorder.attach(stack)
            if level == "operators":
                stack.enter_context(_OperatorMode(recorder))
            yield recording
    except _Stopped:
        pass
    except Exception as raised:
        error = str(raised)
        raise
    finally:
        recorder.finish(recording, token_text, redact=redact, error=error)
    if all(entry.module == OUTSIDE for entry in recorder.entries):
        warnings.warn(
            "Nothing was recorded: inside the block the model was not called. Call the very module that was given to "
            "record(), or a part of it.",
            stacklevel=3,
        )


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside a recorded block: operators of an observer's own, which are none of the model's."""
    with _disable_current_modes():
        yield


class _Stopped(Exception):  # noqa: N818  no error: the first break has been seen
    """Ends a recorded block early."""


class _OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recorder: "_Recorder") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard that True asks for imports the whole compiler, two seconds, on first use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = traits(func)
        if kind.composite:
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        if kind.view:  # shares its memory's origin
            return func(*args, **kwargs)
        return self.recorder.run_operator(kind, args, kwargs)


@dataclass(slots=True)
class _Frame(Frame):
    """With what the module was given, and how many entries there were before it."""

    first_entry: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: list[Operand] | None = None


class _Recorder:
    def __init__(
        self,
        model: nn.Module,
        level: Level,
        formats: tuple[str, ...],
        *,
        position_peaks: bool,
        fused_softmax: bool,
        stop_at_break: bool,
        keep: dict[str, Tensor] | None,
        against: Mapping[str, Tensor],
        watch: Sequence[tuple[str, int]],
    ) -> None:
        self.model = model
        self.level = level
        self.formats = formats
        self.position_peaks = position_peaks
        self.fused_softmax = fused_softmax
        self.stop_at_break = stop_at_break
        self.broken = False
        self.keep = keep
        self.against = against
        self.watch = watch
        self.watched: list[tuple[str, int, Tensor]] = []
        self.frames = [_Frame(OUTSIDE, None)]
        self.entries: list[Entry] = []
        self.step = Step(-1)
        self.starts: list[int] = []
        self.forms: dict[tuple[Any, ...], Form] = {}
        self.pending = Pending()
        self.judgements: list[Callable[[], None]] = []
        self.autocast: str | None = None
        self.seen: set[int] = set()
        self.origins = Origins(
            weights=lambda: ((site_path(name), tensor) for name, tensor in model.named_parameters()),
            constants=((site_path(name), tensor) for name, tensor in model.named_buffers()),
        )
        self.family = family_of(model)
        self.modules = dict(model.named_modules())
        # what a wrapper's `generate` may call without calling the wrapper
        self.wholes = {model} | {
            self.modules[outer]
            for name, module in self.modules.items()
            if isinstance(module, nn.ModuleList)
            for outer in _around(name)
            if not isinstance(self.modules[outer], nn.ModuleList)
        }

    # Hooks

    def attach(self, stack: ExitStack) -> None:
        for name, module in self.modules.items():
            path = site_path(name)
            if self.level == "layers" and not _is_layer(path):
                continue
            for handle in (
                module.register_forward_pre_hook(self._enter(path, module), with_kwargs=True),
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
            ):
                stack.callback(handle.remove)

    def _enter(self, path: str, called: nn.Module) -> Callable[..., None]:
        by_blocks = computes_by_blocks(called)
        is_whole, is_layer, operators = called in self.wholes, _is_layer(path), self.level == "operators"

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.stop_at_break and self.broken:
                raise _Stopped  # not at the break: the modules it ends return first, and lend it their names
            frame = _Frame(path, module, by_blocks, first_entry=len(self.entries), args=args, kwargs=kwargs)
            self.frames.append(frame)
            if is_whole and not any(outer.module in self.wholes for outer in self.frames[:-1]):
                with _aside():
                    self._begin_step(args, kwargs)
            if not operators:
                frame.inputs = self._inputs(frame)
            elif is_layer:
                self._look_for_masks(args, kwargs)

        return hook

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.frames[-1].module is not module:
            return  # never entered: somebody else's hook raised before ours
        frame = self.frames.pop()
        if type(output) is Tensor:
            if has_elements(output):
                self._module_output(frame, 0, output)
        else:
            for index, tensor in enumerate(floating(output)):
                self._module_output(frame, index, tensor)
        if self.judgements and len(self.frames) == 1:
            self._settle()

    def _inputs(self, frame: _Frame) -> list[Operand]:
        given = floating_of_call(frame.args, frame.kwargs)
        return [Operand(tensor, self.origins.of(tensor)) for tensor in given]

    def _begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._settle()
        self.frames[0].numbers.clear()
        self.forms.clear()
        before, step = self.step, Step(self.step.number + 1, _held(kwargs), self.step.rows, self.step.length)
        self.step = step
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
            if self.origins.of(tensor).kind == "constant":  # made inside the block
                self.origins.remember(tensor, Origin("input", "input"))

    def _look_for_masks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Which of the constants and inputs that a device's layers are given hide nothing: known before long."""
        for tensor in floating((args, kwargs)):
            if is_here(tensor):
                continue
            origin = self.origins.of(tensor)
            if origin.may_mask and not origin.looked_at:
                origin.looked_at = True
                with _aside():
                    found = blocks(tensor).any().double().reshape(1)

                def tell(row: Row, origin: Origin = origin) -> None:
                    origin.clear = row[0] == 0

                self.pending.after(found, tell, ())

    def _module_output(self, frame: _Frame, index: int, tensor: Tensor) -> None:
        site = (frame.path or "/output") + (f"[{index}]" if index else "")
        origin = self.origins.of(tensor)
        memory = region(tensor)
        for one in floating_of_call(frame.args, frame.kwargs):
            if region(one) == memory:
                return  # handed on as it came
        repeats = None
        if origin.entry is not None and origin.entry >= frame.first_entry:
            entry = self.entries[origin.entry]
            if self.level == "operators":
                if index and math.prod(entry.form.shape) == tensor.numel():
                    return  # what a module hands out besides keeps its operator's name, as where it is not handed out
                if entry.region == memory:
                    if "/" in entry.site and frame.path:  # the model itself has no path to be called by
                        self._rename(entry, site, tensor)
                    return
            elif entry.region == memory:
                repeats = origin.entry  # without operators a write in between goes unseen, so the statistics decide
        call = Call("module", self._inputs(frame) if frame.inputs is None else frame.inputs)
        self._add(call, tensor, frame, site, repeats=repeats)  # what hides, only operators tell

    # Operators

    def run_operator(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        of = self.origins.of
        if tensors is given:
            operands = [Operand(tensor, of(tensor)) for tensor in given]
        else:
            operands = [Operand(tensor, of(one)) for tensor, one in zip(tensors, given, strict=True)]
        output = func(*args, **kwargs)
        outputs = floating(output)
        if not outputs:
            return output
        if moves(kind, tensors[-1] if tensors else None, outputs[0]):
            self._pass_on(kind, operands, outputs)
            return output
        overwritten: Origin | None = None
        if kind.name == "cast" and kind.writes_in_place:  # what stood there before is no operand
            overwritten = operands.pop(0).origin
        constant = overwritten is None or overwritten.kind == "constant"
        hides = kind.name in SELECTIONS
        for operand in operands:
            constant = constant and operand.origin.kind == "constant"
            hides = hides or operand.origin.may_hide
        if constant or kind.factory:
            for tensor in outputs:
                self.origins.remember(tensor, Origin("constant", kind.name))
            return output
        frame = self.frames[-1]
        site = frame.site(kind.name)
        call = Call(kind.name, operands, func, seen_args, seen_kwargs)
        fused = kind.name == FUSED_ATTENTION
        for i, tensor in enumerate(outputs[:1] if fused else outputs):  # the rest is the kernel's own bookkeeping
            self._add(call, tensor, frame, f"{site}[{i}]" if i else site, hides=hides)
        if overwritten is not None:
            self._also_lost(self.origins.of(outputs[0]), [overwritten])  # elsewhere in that memory
        if fused and self.fused_softmax:
            with _aside():
                self.entries[-1].softmax = recompute_softmax(func, args, kwargs)
        return output

    def _pass_on(self, kind: Traits, operands: list[Operand], outputs: list[Tensor]) -> None:
        """A move's output has its operand's origin, or a constant's where nothing floating went in."""
        origins = [operand.origin for operand in operands]
        hides = False
        if not kind.writes_in_place and any(origin.may_hide for origin in origins):
            with _aside():
                hides = any(operand.hides() is not None for operand in operands)
        for tensor in outputs:
            if kind.writes_in_place:
                if any(origin.kind != "constant" for origin in origins):
                    # blocks that are put together are the record that they share
                    entry = origins[-1].entry if self.frames[-1].block is not None else None
                    origin = Origin("computed", origins[-1].name if entry is not None else kind.name, entry)
                    self._also_lost(origin, origins)
                    self.origins.remember(tensor, origin)
                continue
            if operands and is_view_of(tensor, operands[0].tensor):
                continue  # a view shares its memory's origin
            if not origins or kind.name in ("lift", "lift_fresh"):
                origin = Origin("constant", kind.name)
            elif len(origins) == 1 or all(other is origins[0] for other in origins):
                origin = origins[0]
            else:
                origin = Origin("computed", kind.name)
                self._also_lost(origin, origins)
            if hides:  # elements moved, and the mask with them
                with _aside():
                    where = blocks(measurable(tensor), narrowest(tensor, operands))
                    moved = hidden(where, tensor.stride())
                moved_from, origin = origin, replace(origin, masked=moved, hidden=None)
                self._also_lost(origin, [moved_from])
            self.origins.remember(tensor, origin)

    def _also_lost(self, origin: Origin, others: list[Origin]) -> None:
        def tell() -> None:
            origin.lost = origin.lost or any(other.lost for other in others)

        if self.pending:
            self.pending.do(tell)
        else:
            tell()

    # Records

    def _add(
        self,
        call: Call,
        tensor: Tensor,
        frame: _Frame,
        site: str,
        *,
        hides: bool = False,
        repeats: int | None = None,
    ) -> None:
        values = tensor
        if tensor.dtype not in _MEASURED:
            with _aside():
                values = measurable(tensor)
        masked: Hidden | None = None
        where, limit = None, math.inf
        if hides:
            with _aside():
                found = may_hide(call, values)
                if found is not None:
                    masked, limit = found
                    where = masked.where
        entry, axes, part, pairs = self._entry(call, tensor, values, frame, site, repeats)
        number = len(self.entries)
        if part is not None and frame.of_blocks is not None:
            number = frame.of_blocks.setdefault(site, number)
        if number == len(self.entries):
            self.entries.append(entry)
        origin = Origin("computed", site, number, pairs=pairs)

        row: Row | Tensor
        if self.position_peaks and axes.position is not None and not values.is_meta:
            with _aside():
                row, peaks = tally_by_position(values, entry.form.edges, axes, where, limit)
                entry.take_peaks(peaks, part)
        else:
            row = tally(values, entry.form.edges, where, limit)
        if masked is not None and (masked.count is None or row[_MASKED] != masked.count):
            with _aside():
                masked = _narrowed(masked, values, limit) if masked.count is None or row[_MASKED] else None
        if masked is not None:
            origin.masked = replace(masked, stride=tensor.stride())
        self.origins.remember(tensor, origin)
        if call.name == "softmax" and call.operands and values.numel() and values.ndim and not values.is_meta:
            self._take_softmax(entry, call, values, axes)
        self._look_at(entry, values, part)

        shown = None if masked is None else masked.where
        if isinstance(row, Tensor):
            keeping = [values, *(operand.tensor for operand in call.operands)]
            self.pending.after(
                row, lambda row: self._take(row, entry, call, values, shown, axes, part, origin), keeping
            )
        elif self.pending:
            self.pending.do(lambda: self._take(row, entry, call, values, shown, axes, part, origin))
        elif part is not None or row[_NAN] or row[_PLUS] or row[_MINUS]:
            self._take(row, entry, call, values, shown, axes, part, origin)
        else:
            entry.row = row

    def _entry(
        self, call: Call, tensor: Tensor, values: Tensor, frame: _Frame, site: str, repeats: int | None
    ) -> tuple[Entry, Axes, Part | None, bool]:
        """The entry of a tensor that may be a part of it; its own axes; which part; whether it joins positions."""
        shape, step = values.shape, self.step
        pairs = False
        block = frame.block if call.func is not None else None
        if block is not None:
            queries, keys = block.stop - block.start, block.last_key - block.first_key
            pairs = len(shape) > 2 and shape[-2:] == (queries, keys) and joins_positions(call, values)
            part = part_of(tuple(shape), block, by_key=pairs)
            if part is not None:
                by_position = pairs and block.queries == block.keys  # else keys count those in a cache too
                axes = part.axes(axes_of(part.shape, step.rows, queries, by_position))
                number = None if frame.of_blocks is None else frame.of_blocks.get(site)
                if number is not None:
                    return self.entries[number], axes, part, pairs
                form = self._form(tensor, values, part.whole, by_position)
                return Entry(step, frame.path, site, call.name, region(tensor), form), axes, part, pairs
        elif len(shape) > 2 and shape[-1] == shape[-2] == step.length:
            pairs = joins_positions(call, values)
        form = self._form(tensor, values, shape, pairs)
        operator = None if call.func is None else call.name
        return Entry(step, frame.path, site, operator, region(tensor), form, repeats=repeats), form.axes, None, pairs

    def _form(self, tensor: Tensor, values: Tensor, shape: tuple[int, ...], pairs: bool) -> Form:
        key = (tensor.dtype, shape, pairs)
        form = self.forms.get(key)
        if form is None:
            form = self.forms[key] = Form(
                NAMES[values.dtype if tensor.is_complex() else tensor.dtype],
                tuple(shape),
                axes_of(tuple(shape), self.step.rows, self.step.length, pairs),
                edges(values.dtype, self.formats),
            )
        return form

    def _take(
        self,
        row: Row,
        entry: Entry,
        call: Call,
        values: Tensor,
        masked: Tensor | None,
        axes: Axes,
        part: Part | None,
        origin: Origin,
    ) -> None:
        """What was counted of a tensor; of one that is not finite, where and why."""
        lost = row[_NAN] + row[_PLUS] + row[_MINUS]
        entry.take(row, part)
        if not lost:
            return
        origin.lost = True
        with _aside():
            where = ~values.isfinite() if masked is None else ~values.isfinite() & ~masked
            entry.take_lost(where, axes, part)
        if call.name in SELECTIONS or any(o.origin.lost for o in call.operands if o.origin.kind == "computed"):
            return  # an infinity that was chosen, or one that an operand had

        def look_closer() -> None:
            with _aside():
                finding = judge(call, values, where, axes, FORMATS.get(entry.form.dtype, FLOAT32))
            if finding is None:
                return
            broke = finding.broke
            if entry.broke is None:  # else in an earlier block
                if part is not None:
                    index = index_at(part.index(flat_index(broke.index, part.shape)), part.whole)
                    broke = replace(broke, index=index, channel=index[-1])
                position = entry.absolute(broke.position)
                entry.broke = replace(broke, position=position, token=entry.token(broke.row, position))
                entry.broke_on = finding.origins
            else:
                entry.broke = replace(entry.broke, count=entry.broke.count + broke.count)
            self.broken = True

        if is_here(values):
            look_closer()
        else:  # which waits for the device, and that the pass must not
            self.judgements.append(look_closer)

    def _take_softmax(self, entry: Entry, call: Call, values: Tensor, axes: Axes) -> None:
        with _aside():
            logits = call.operands[0]
            blocked = logits.hides()
            if entry.softmax is None:
                entry.softmax = SoftmaxTally()
            entry.softmax.add(
                logits.tensor,
                values,
                int(call.args[1]) % values.ndim,
                axes.head if axes.shape == tuple(values.shape) else None,
                None if blocked is None else blocked.where,
            )

    def _settle(self) -> None:
        """Waits for what is on its way, and looks closer at what broke."""
        self.pending.settle()
        judgements, self.judgements = self.judgements, []
        for look_closer in judgements:
            look_closer()

    def _rename(self, entry: Entry, site: str, tensor: Tensor) -> None:
        if self.keep is not None and entry.site in self.keep:
            del self.keep[entry.site]
        entry.site = site
        self._look_at(entry, tensor)

    def _look_at(self, entry: Entry, tensor: Tensor, part: Part | None = None) -> None:
        """What depends on the site's name, and is done again when it changes."""
        site = entry.site
        if self.keep is None and not self.against and not self.watch:
            return
        with _aside():
            if self.keep is not None and _is_compared(site):
                self.keep[site] = tensor.detach().clone()
            if site in self.against:
                stored = FORMATS.get(entry.form.dtype, FLOAT32)
                entry.deviation = measure_deviation(tensor, self.against[site], stored)
            for watched, index in self.watch:
                at = index if part is None else part.holds(index)
                if watched == site and at is not None and at < tensor.numel():
                    self.watched.append((site, index, tensor.reshape(-1)[at].clone()))

    # The result

    def header(self, case: Mapping[str, Any]) -> Header:
        parameter = next(self.model.parameters(), torch.empty(0))
        return Header(
            checkpoint=getattr(self.model, "source", None),
            sha256=getattr(self.model, "sha256", None),
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=str(parameter.device),
            level=self.level,
            matmul="native",
            formats=self.formats,
            rows=0,
            tokens=None,
            notes=tuple(getattr(self.model, "notes", ())),
            case=dict(case),
            versions=_versions(),
            machine={
                "system": platform.system(),
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "accelerator": torch.cuda.get_device_name() if parameter.is_cuda else None,
            },
        )

    def finish(
        self, recording: Recording, piece: Callable[[int], str] | None, *, redact: bool, error: str | None
    ) -> None:
        watched: list[tuple[str, int, float]] = []
        with suppress(RuntimeError):  # a device that failed has nothing more to say; what it said before is kept
            self._settle()
            watched += [(site, index, float(element)) for site, index, element in self.watched]
        step = self.step
        tokens = None if redact or not step.tokens else tuple(map(tuple, step.tokens))
        if tokens is not None and piece is None:
            piece = getattr(getattr(self.model, "tokenizer", None), "piece", None)
        texts = {} if tokens is None or piece is None else _texts(sorted(self.seen), piece)
        recording.header = replace(
            recording.header,
            dtype=self.autocast or recording.header.dtype,
            watched=tuple(watched),
            rows=step.rows or 0,
            tokens=tokens,
            token_texts=texts,
            starts=tuple(self.starts),
            error=error,
        )
        header = recording.header
        recording.records = lambda: self._records(header)
        self.origins.forget()
        self.frames.clear()

    def _records(self, header: Header) -> list[Record]:
        whole = [entry for entry in self.entries if entry.row is not None]
        again = {
            id(entry)
            for entry in whole
            if entry.repeats is not None and entry.statistics == self.entries[entry.repeats].statistics
        }
        return [
            entry.record(order, header, family=self.family, site_of=self._site_of)
            for order, entry in enumerate(entry for entry in whole if id(entry) not in again)
        ]

    def _site_of(self, origin: Origin) -> str:
        return origin.name if origin.entry is None else self.entries[origin.entry].site


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("stabilitykit", "torch", "numpy")} | {"python": platform.python_version()}


def _texts(tokens: Sequence[int], piece: Callable[[int], str]) -> dict[int, str]:
    """Ids without a text stay so: this runs while an exception may be on its way, and must not replace it."""
    texts = {}
    for token in tokens:
        with suppress(Exception):
            texts[token] = piece(token)
    return texts


def _around(name: str) -> Iterator[str]:
    """The names of the modules that hold the one of this name, the model's own, "", too."""
    while name:
        name = name.rpartition(".")[0]
        yield name


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


def _narrowed(masked: Hidden, values: Tensor, limit: float) -> Hidden | None:
    """Of the elements that a mask would hide those that are very negative."""
    return hidden(masked.where & (values <= limit), values.stride())


@contextmanager
def _aside() -> Iterator[None]:
    """For operators of the recorder's own."""
    with _disable_current_modes(), torch.no_grad():
        yield


def _is_compared(site: str) -> bool:
    """Whether a run's copy of this tensor is worth its memory: modules' outputs, and sums directly in a layer."""
    module, slash, operator = site.partition("/")
    return not slash or (module.rpartition(".")[2].isdigit() and operator.startswith("add."))
