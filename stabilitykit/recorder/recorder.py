"""`record(model)`: forward hooks on every module and, between them, every operator, as one list of records.

    with record(model) as recording:
        logits = model(tokens)
    recording.first_break()

The hooks know where the program is; the operator mode sees what no module returns: residual adds, attention
scores, gate · up. A tensor is measured the moment it exists, because the next operator may write over it.
Nothing is changed: the model computes the same bits with and without a recorder, and no hook outlives the
block. Each tensor costs a few passes over its elements and one wait for the device.
"""

import math
import os
import platform
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from stabilitykit.errors import MisuseError
from stabilitykit.formats import FLOAT32, FORMATS, number_format
from stabilitykit.recorder.attention import FUSED_ATTENTION, recompute_softmax
from stabilitykit.recorder.axes import axes_of
from stabilitykit.recorder.deviation import measure_deviation
from stabilitykit.recorder.entry import Entry
from stabilitykit.recorder.judgement import (
    Call,
    Finding,
    Operand,
    blocks,
    joins_positions,
    judge,
    may_hide,
    narrowest,
)
from stabilitykit.recorder.kernels.layout import Field, edges
from stabilitykit.recorder.labels import family_of
from stabilitykit.recorder.operators import SELECTIONS, Traits, moves, traits
from stabilitykit.recorder.origins import Hidden, Origin, Origins, region
from stabilitykit.recorder.peaks import measure_peaks, position_peaks
from stabilitykit.recorder.softmax import measure_softmax
from stabilitykit.recorder.statistics import Statistics, measurable, measure, tally
from stabilitykit.records import Header, Level, Recording

DEFAULT_FORMATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")

Detail = Literal["statistics", "peaks"]

_MEASURED = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
# Those whose tensors are looked at, by the name that records have.
_NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
}
_LEAVES = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))

_MASKED, _NAN, _PLUS, _MINUS = int(Field.MASKED), int(Field.NAN), int(Field.PLUS), int(Field.MINUS)

_OUTSIDE = "outside"  # where operators stand that no part of the model runs
_WRAPPERS = re.compile(
    r"^(base_model\.(model\.)?)?(model\.)?"
)  # of peft, and of transformers' and gemma_pytorch's heads


@contextmanager
def record(
    model: nn.Module,
    *,
    level: Level = "operators",
    detail: Detail = "statistics",
    formats: Sequence[str] = DEFAULT_FORMATS,
    position_peaks: bool = False,
    fused_softmax: bool = True,
    stop_at_break: bool = False,
    keep: dict[str, Tensor] | None = None,
    against: Mapping[str, Tensor] | None = None,
    matmul: str = "native",
    watch: Sequence[tuple[str, int]] = (),
    token_text: Callable[[int], str] | None = None,
    redact: bool = False,
    case: Mapping[str, Any] | None = None,
) -> Iterator[Recording]:
    """Records every forward pass of `model` inside the block; the recording is complete when the block ends.

    `level`: "layers" sees the outputs of the decoder layers and the model's direct children, "modules" those of
    every module, "operators" every operator too. `detail`: "peaks" leaves out of tensors that are finite all that
    takes more than two reductions: histogram, counts, sums, softmax statistics. `formats`: those for which exact
    counts are kept. `position_peaks` keeps each position's amax. `fused_softmax`: a fused attention kernel runs as it
    is and keeps no probabilities, so its softmax statistics are recomputed in float32 from the queries and keys it
    was given. `stop_at_break` ends the block at the first break, whatever follows in it.

    `keep` is filled with copies of the modules' outputs and the residual sums by site, last step first;
    handed to another run of the same tokens as `against`, they become its records' `deviation`. `matmul` says in the
    header how products are computed, which is the caller's to choose.

    `watch` names single elements, by site and row-major index, whose values the header keeps as `watched`.
    `token_text` gives a token id's text; a model with a `tokenizer` that has `piece` needs none. `redact` keeps
    tokens out of the recording. `case` goes into the header as it is.

    Each call of `model`, or of a module in it that holds the layers, is a step; what runs between two of them, such as
    a sampler, belongs to the first and has sites that begin with "outside". The tokens are the argument named
    `input_ids`, or else the first integer tensor of shape [L] or [B, L]. An exception raised in the block is kept as
    the header's `error` and passed on. Functions compiled by `torch.compile` run uncompiled inside the block.

    Raises MisuseError for an unknown level, detail or format, for a model or a module of it that went through
    `torch.compile`. Warns at the end of a block in which no part of the model was called.
    """
    if level not in get_args(Level):
        raise MisuseError(f"A level is one of {', '.join(get_args(Level))}; {level!r} is none of them.")
    if detail not in get_args(Detail):
        raise MisuseError(f"A detail is one of {', '.join(get_args(Detail))}; {detail!r} is none of them.")
    for name in formats:
        number_format(name)
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        raise MisuseError(
            "A recorded model runs operator by operator; this one, or a part of it, is compiled into kernels that no "
            "hook sees. Record the model from before torch.compile, which keeps it as `_orig_mod`, or load it again if "
            "it was model.compile()."
        )
    recorder = _Recorder(
        model,
        level,
        detail,
        tuple(formats),
        position_peaks=position_peaks,
        fused_softmax=fused_softmax,
        stop_at_break=stop_at_break,
        keep=keep,
        against=against or {},
        matmul=matmul,
        watch=watch,
    )
    recording = Recording(recorder.header(case or {}))
    error: str | None = None
    try:
        with ExitStack() as stack:
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
    if all(entry.module == _OUTSIDE for entry in recorder.entries):
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
class _Frame:
    """A module that is being executed."""

    path: str
    module: nn.Module | None
    first_entry: int
    inputs: list[Operand] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class _Recorder:
    def __init__(
        self,
        model: nn.Module,
        level: Level,
        detail: Detail,
        formats: tuple[str, ...],
        *,
        position_peaks: bool,
        fused_softmax: bool,
        stop_at_break: bool,
        keep: dict[str, Tensor] | None,
        against: Mapping[str, Tensor],
        matmul: str,
        watch: Sequence[tuple[str, int]],
    ) -> None:
        self.model = model
        self.level = level
        self.detail = detail
        self.formats = formats
        self.position_peaks = position_peaks
        self.fused_softmax = fused_softmax
        self.stop_at_break = stop_at_break
        self.broken = False
        self.keep = keep
        self.against = against
        self.matmul = matmul
        self.watch = watch
        self.watched: list[tuple[str, int, float]] = []
        self.frames = [_Frame(_OUTSIDE, None, 0)]
        self.entries: list[Entry] = []
        self.step = -1
        self.rows: int | None = None
        self.length: int | None = None
        self.start = 0
        self.starts: list[int] = []
        self.autocast: str | None = None
        self.tokens: list[list[int]] = []  # of the sequences now running, with what their cache holds
        self.seen: set[int] = set()
        self.origins = Origins(
            weights=lambda: ((_path(name), tensor) for name, tensor in model.named_parameters()),
            constants=((_path(name), tensor) for name, tensor in model.named_buffers()),
        )
        self.family = family_of(model)
        # what a wrapper's `generate` may call without calling the wrapper
        self.wholes = {m for m in model.modules() if any(isinstance(part, nn.ModuleList) for part in m.modules())}
        self.wholes = {m for m in self.wholes if not isinstance(m, nn.ModuleList)} | {model}

    # Hooks

    def attach(self, stack: ExitStack) -> None:
        for name, module in self.model.named_modules():
            path = _path(name)
            if self.level == "layers" and not _is_layer(path):
                continue
            for handle in (
                module.register_forward_pre_hook(self._enter(path), with_kwargs=True),
                module.register_forward_hook(self._leave(), with_kwargs=True, always_call=True),
            ):
                stack.callback(handle.remove)

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.stop_at_break and self.broken:
                raise _Stopped  # not at the break: the modules it ends return first, and lend it their names
            frame = _Frame(path, module, len(self.entries))
            self.frames.append(frame)
            if module in self.wholes and not any(outer.module in self.wholes for outer in self.frames[:-1]):
                with _aside():
                    self._begin_step(args, kwargs)
            frame.inputs = [Operand(tensor, self.origins.of(tensor)) for tensor in _floating((args, kwargs))]

        return hook

    def _leave(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.frames[-1].module is not module:
                return  # never entered: somebody else's hook raised before ours
            frame = self.frames.pop()
            for index, tensor in enumerate(_floating(output)):
                self._module_output(frame, index, tensor)

        return hook

    def _begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step += 1
        self.frames[0].counts.clear()
        self.start = _held(kwargs)
        self.starts.append(self.start)
        devices = {tensor.device.type for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for device in devices - {"meta"}:
            if torch.is_autocast_enabled(device):
                self.autocast = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        tensors = [leaf for leaf in tree_leaves((kwargs.get("input_ids"), args, kwargs)) if isinstance(leaf, Tensor)]
        ids = next((t for t in tensors if t.dtype in (torch.int32, torch.int64) and t.ndim in (1, 2)), None)
        embedded = next((t for t in tensors if t.is_floating_point() and t.ndim == 3), None)
        if ids is not None:
            ids = ids.reshape(-1, ids.shape[-1])
            self.rows, self.length = ids.shape
            new = ids.tolist()
            self.seen.update(*new)
            continues = self.start > 0 and len(self.tokens) == len(new)
            self.tokens = [old + more for old, more in zip(self.tokens, new, strict=True)] if continues else new
        elif embedded is not None:
            self.rows, self.length = embedded.shape[:2]
        for tensor in _floating((args, kwargs)):
            if self.origins.of(tensor).kind == "constant":  # made inside the block
                self.origins.remember(tensor, Origin("input", "input"))

    def _module_output(self, frame: _Frame, index: int, tensor: Tensor) -> None:
        site = (frame.path or "/output") + (f"[{index}]" if index else "")
        origin = self.origins.of(tensor)
        memory = region(tensor)
        if any(memory == region(operand.tensor) for operand in frame.inputs):
            return  # handed on as it came
        if origin.entry is not None and origin.entry >= frame.first_entry:
            entry = self.entries[origin.entry]
            if self.level == "operators":
                if index and entry.statistics.elements == tensor.numel():
                    return  # what a module hands out besides keeps its operator's name, as where it is not handed out
                if entry.region == memory:
                    if "/" in entry.site and frame.path:  # the model itself has no path to be called by
                        self._rename(entry, site, tensor)
                    return
            elif entry.region == memory and entry.statistics == self._measured(tensor):
                return  # without operators a write in between goes unseen, so the statistics decide
        call = Call("module", frame.inputs)
        self._add(call, tensor, frame.path, site)

    def _measured(self, tensor: Tensor) -> Statistics:
        with _aside():
            return measure(tensor, self.formats)

    # Operators

    def run_operator(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        func = kind.func
        seen_args, seen_kwargs = args, kwargs
        tensors = given = _floating((args, kwargs))
        if kind.writes_in_place and kind.combines:  # what it combines is about to be written over
            seen_args, seen_kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
            tensors = _floating((seen_args, seen_kwargs))
        origins = [self.origins.of(tensor) for tensor in given]
        output = func(*args, **kwargs)
        outputs = _floating(output)
        if not outputs:
            return output
        operands = [Operand(tensor, origin) for tensor, origin in zip(tensors, origins, strict=True)]
        if moves(kind, tensors[-1] if tensors else None, outputs[0]):
            with _aside():
                self._pass_on(kind, operands, outputs)
            return output
        overwritten: Origin | None = None
        if kind.name == "cast" and kind.writes_in_place:  # what stood there before is no operand
            overwritten = operands.pop(0).origin
        constant = all(operand.origin.kind == "constant" for operand in operands)
        if kind.factory or (constant and (overwritten is None or overwritten.kind == "constant")):
            for tensor in outputs:
                self.origins.remember(tensor, Origin("constant", kind.name))
            return output
        frame = self.frames[-1]
        index = frame.counts[kind.name]
        frame.counts[kind.name] += 1
        call = Call(kind.name, operands, func, seen_args, seen_kwargs)
        site = f"{frame.path}/{kind.name}.{index}"
        fused = kind.name == FUSED_ATTENTION
        for i, tensor in enumerate(outputs[:1] if fused else outputs):  # the rest is the kernel's own bookkeeping
            self._add(call, tensor, frame.path, f"{site}[{i}]" if i else site)
        if overwritten is not None and overwritten.lost:
            self.origins.of(outputs[0]).lost = True  # elsewhere in that memory
        if fused and self.fused_softmax and self.detail == "statistics":
            with _aside():
                self.entries[-1].softmax = recompute_softmax(func, args, kwargs)
        return output

    def _pass_on(self, kind: Traits, operands: list[Operand], outputs: list[Tensor]) -> None:
        """A move's output has its operand's origin, or a constant's where nothing floating went in."""
        origins = [operand.origin for operand in operands]
        for tensor in outputs:
            if kind.writes_in_place:
                if any(origin.kind != "constant" for origin in origins):
                    self.origins.remember(tensor, Origin("computed", kind.name, lost=any(o.lost for o in origins)))
                continue
            if operands and region(tensor)[0] == region(operands[0].tensor)[0]:
                continue  # a view shares its memory's origin
            if not origins or kind.name in ("lift", "lift_fresh"):
                origin = Origin("constant", kind.name)
            elif len(origins) == 1 or all(other is origins[0] for other in origins):
                origin = origins[0]
            else:
                origin = Origin("computed", kind.name, lost=any(o.lost for o in origins))
            if any(operand.hides() is not None for operand in operands):  # elements moved, and the mask with them
                where = blocks(measurable(tensor), narrowest(tensor, operands))
                origin = replace(origin, masked=Hidden(where, tensor.stride(), int(where.sum())), hidden={})
            self.origins.remember(tensor, origin)

    # Records

    def _add(self, call: Call, tensor: Tensor, module: str, site: str) -> None:
        values = tensor
        if tensor.dtype not in _MEASURED:
            with _aside():
                values = measurable(tensor)
        shape = tuple(values.shape)
        masked: Hidden | None = None
        hidden, limit = None, math.inf
        if call.name in SELECTIONS or any(operand.origin.may_hide for operand in call.operands):
            with _aside():
                found = may_hide(call, values)
                if found is not None:
                    masked, limit = found
                    hidden = masked.where
        pairs = joins_positions(call, values, self.length)
        entry = Entry(
            step=max(self.step, 0),
            module=module,
            site=site,
            operator=None if call.func is None else call.name,
            region=region(tensor),
            dtype=_NAMES[values.dtype if tensor.is_complex() else tensor.dtype],
            shape=shape,
            axes=axes_of(shape, self.rows, self.length, pairs),
            start=self.start,
            length=self.length or 0,
            tokens=self.tokens,
        )
        if self.detail == "peaks":
            with _aside():
                if masked is not None:
                    masked = _narrowed(masked, values, limit)
                self._measure_peaks(entry, values, masked)
        if entry.measured is None:
            entry.edges = edges(values.dtype, self.formats)
            entry.row = tally(values, entry.edges, hidden, limit)
            if masked is not None and entry.row[_MASKED] != masked.count:
                with _aside():
                    masked = _narrowed(masked, values, limit) if entry.row[_MASKED] else None
            if self.position_peaks and entry.axes.position is not None:
                with _aside():
                    entry.position_amax = position_peaks(values, entry.axes, None if masked is None else masked.where)
        if masked is not None:
            masked = replace(masked, stride=tensor.stride())
        origin = Origin("computed", site, len(self.entries), masked=masked, pairs=pairs)
        row = entry.row
        if row is not None and (row[_NAN] or row[_PLUS] or row[_MINUS]):
            with _aside():
                stored = FORMATS.get(entry.dtype, FLOAT32)
                where = None if masked is None else masked.where
                self._judge(entry, judge(call, values, where, entry.axes, stored), origin)
        if self.detail == "statistics" and call.name == "softmax" and call.operands and values.numel() and values.ndim:
            with _aside():
                logits = call.operands[0]
                dim = int(call.args[1]) % values.ndim
                blocked = logits.hides()
                where = None if blocked is None else blocked.where
                head = entry.axes.head if entry.axes.shape == shape else None
                entry.softmax = measure_softmax(logits.tensor, values, dim, head, where)
        self.entries.append(entry)
        self.origins.remember(tensor, origin)
        self._look_at(entry, values)
        self.broken |= entry.broke is not None

    def _measure_peaks(self, entry: Entry, values: Tensor, masked: Hidden | None) -> None:
        found = measure_peaks(values, entry.axes, None if masked is None else masked.where)
        if found is not None:
            entry.measured = found[0]
            entry.position_amax = found[1] if self.position_peaks else None

    def _rename(self, entry: Entry, site: str, tensor: Tensor) -> None:
        if self.keep is not None and entry.site in self.keep:
            del self.keep[entry.site]
        entry.site = site
        self._look_at(entry, tensor)

    def _look_at(self, entry: Entry, tensor: Tensor) -> None:
        """What depends on the site's name, and is done again when it changes."""
        site = entry.site
        if self.keep is None and not self.against and not self.watch:
            return
        with _aside():
            if self.keep is not None and _is_compared(site):
                self.keep[site] = tensor.detach().clone()
            if site in self.against:
                entry.deviation = measure_deviation(tensor, self.against[site], FORMATS.get(entry.dtype, FLOAT32))
            for watched, index in self.watch:
                if watched == site and index < tensor.numel():
                    self.watched.append((site, index, float(tensor.reshape(-1)[index])))

    def _judge(self, entry: Entry, finding: Finding, origin: Origin) -> None:
        origin.lost = True
        axes = entry.axes
        lost = finding.lost.reshape(axes.shape)
        entry.lost_channels = _count_slices(lost, {lost.ndim - 1})
        kept = {d for d in (axes.row, axes.position) if d is not None}
        entry.lost_positions = _count_slices(lost, kept) if axes.position is not None or axes.at_last else 0
        if finding.broke is not None:
            broke = finding.broke
            position = entry.absolute(broke.position)
            entry.broke = replace(broke, position=position, token=entry.token(broke.row, position))
            entry.broke_on = finding.origins

    # The result

    def header(self, case: Mapping[str, Any]) -> Header:
        parameter = next(self.model.parameters(), torch.empty(0))
        return Header(
            checkpoint=getattr(self.model, "source", None),
            sha256=getattr(self.model, "sha256", None),
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=str(parameter.device),
            level=self.level,
            matmul=self.matmul,
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
        tokens = None if redact or not self.tokens else tuple(map(tuple, self.tokens))
        if tokens is not None and piece is None:
            piece = getattr(getattr(self.model, "tokenizer", None), "piece", None)
        texts = {} if tokens is None or piece is None else _texts(sorted(self.seen), piece)
        recording.header = replace(
            recording.header,
            dtype=self.autocast or recording.header.dtype,
            watched=tuple(self.watched),
            rows=self.rows or 0,
            tokens=tokens,
            token_texts=texts,
            starts=tuple(self.starts),
            error=error,
        )
        header = recording.header
        recording.records = lambda: [
            entry.record(order, header, family=self.family, site_of=self._site_of)
            for order, entry in enumerate(self.entries)
        ]
        self.origins.forget()
        self.frames.clear()

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


def _path(name: str) -> str:
    """A module's or parameter's path as sites have it: without what wraps the text model it belongs to."""
    name = _WRAPPERS.sub("", f"{name}.")
    return name.removesuffix(".")


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


def _floating(tree: Any) -> list[Tensor]:
    """The floating and complex tensors in nested arguments or results, in order.

    Without those that have no elements to look at: sparse, nested and meta tensors, and subclasses that wrap others.
    """
    if type(tree) is Tensor:
        return [tree] if _has_elements(tree) else []
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(node: Any, found: list[Tensor]) -> None:
    kind = type(node)
    if kind is Tensor or kind is nn.Parameter:
        if _has_elements(node):
            found.append(node)
    elif kind is tuple or kind is list:
        for leaf in node:
            if type(leaf) not in _LEAVES:
                _collect(leaf, found)
    elif kind is dict:
        for leaf in node.values():
            if type(leaf) not in _LEAVES:
                _collect(leaf, found)
    elif kind not in _LEAVES:
        for leaf in tree_leaves(node):
            if type(leaf) in (Tensor, nn.Parameter) and _has_elements(leaf):
                found.append(leaf)


def _has_elements(tensor: Tensor) -> bool:
    return (
        tensor.dtype in _NAMES
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _narrowed(hidden: Hidden, values: Tensor, limit: float) -> Hidden:
    """Of the elements that a mask would hide those that are very negative."""
    where = hidden.where & (values <= limit)
    return Hidden(where, values.stride(), int(where.sum()))


@contextmanager
def _aside() -> Iterator[None]:
    """For operators of the recorder's own."""
    with _disable_current_modes(), torch.no_grad():
        yield


def _count_slices(lost: Tensor, kept: set[int]) -> int:
    """How many index combinations over the `kept` dimensions hold at least one True."""
    others = [dim for dim in range(lost.ndim) if dim not in kept]
    return int((lost.any(dim=others) if others else lost).sum())


def _is_compared(site: str) -> bool:
    """Whether a run's copy of this tensor is worth its memory: modules' outputs, and sums directly in a layer."""
    module, slash, operator = site.partition("/")
    return not slash or (module.rpartition(".")[2].isdigit() and operator.startswith("add."))
