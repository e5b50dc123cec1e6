"""Backward passes inside a recorded block: left alone while they run, and what they leave looked at.

Autograd's own operators are not recorded: derivatives take other paths under an operator mode, and would come out with
other bits. Parameters whose gradients are not finite afterwards are one break, unless hooks have seen it come about.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.formats import FLOAT32, FORMATS
from stabilitykit.models.operators import unwatched
from stabilitykit.recorder.entry import Entry
from stabilitykit.recorder.gradients import Gradients
from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.names import site_path
from stabilitykit.recorder.observation import form_of
from stabilitykit.recorder.observe import Observer
from stabilitykit.recorder.pending import Row
from stabilitykit.recorder.statistics import tally
from stabilitykit.recorder.tensors import aside, has_elements, measurable, region
from stabilitykit.recorder.unseen import Unseen
from stabilitykit.records import BACKWARD, Break, index_at

_lock = Lock()
_watchers: dict[int, list["Backward"]] = {}  # by thread, outermost block first
_engines: list[tuple[Any, Any, Any]] = []  # the modules that hold autograd's entry point, what it was, what it is now


class Backward:
    """Looks at the gradients of `model` after each backward pass in the block; `gradients` while it runs, if given."""

    def __init__(
        self, model: nn.Module, observer: Observer, unseen: Unseen, gradients: Gradients | None = None
    ) -> None:
        self._model = model
        self.gradients = gradients
        self._observer = observer
        self._unseen = unseen
        self._turns = count()
        self._turn: dict[int, int] = {}  # by module, when it last began
        self._lost: set[int] = set()  # parameters whose gradients were not finite when last looked at

    def ran(self, module: nn.Module | None) -> None:
        """`module` begins."""
        self._turn[id(module)] = next(self._turns)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Until the end of the block."""
        thread = get_ident()
        with _lock:
            if not _engines:
                _intercept()
            _watchers.setdefault(thread, []).append(self)
        try:
            yield
        finally:
            with _lock:
                _watchers[thread].remove(self)
                if not _watchers[thread]:
                    del _watchers[thread]
                if not _watchers:
                    _let_go()

    def ended(self) -> None:
        """A backward pass has ended."""
        with self._unseen.guard("the gradients after a backward pass"), aside():
            grads = [(name, held) for name, held in self._model.named_parameters() if _gradient(held) is not None]
            lost = [not finite for finite in _are_finite([_gradient(held) for _, held in grads])]
            found = [one for one, is_lost in zip(grads, lost, strict=True) if is_lost]
            told = self._lost if self.gradients is None else self._lost | self.gradients.lost
            new = [(name, held) for name, held in found if id(held) not in told]
            self._lost = {id(held) for _, held in found}
            if new:
                turns = self._last_turns()
                # of those that never ran, or whose modules are not followed, the one that was registered last
                name, held = max(reversed(new), key=lambda one: turns.get(id(one[1]), -1))
                self._add(site_path(name), held)

    def _last_turns(self) -> dict[int, int]:
        """By parameter, when a module that has it last ran; where it is not followed, the nearest around it."""
        turns: dict[int, int] = {}
        by_path: dict[str, int] = {}
        for path, module in self._model.named_modules():
            outer = by_path.get(path.rpartition(".")[0], -1) if path else -1
            turn = by_path[path] = self._turn.get(id(module), outer)
            for held in module._parameters.values():
                turns[id(held)] = max(turn, turns.get(id(held), -1))
        return turns

    def _add(self, path: str, held: Tensor) -> None:
        observer, tensor = self._observer, _gradient(held)
        assert tensor is not None
        values = measurable(tensor)
        shape = tuple(values.shape)
        form = form_of(tensor, values, shape, Axes(shape), observer.options.formats)
        entry = Entry(observer.places.step, BACKWARD, f"{BACKWARD}/{path}", None, region(tensor), form, of_weight=True)
        lost = ~values.isfinite()
        index = index_at(int(lost.flatten().int().argmax()), shape)
        entry.broke = Break(
            kind="unresolved",
            count=int(lost.sum()),
            row=None,
            position=None,
            channel=None,
            token=None,
            index=index,
            operands=(),
            operand_sites=(),
            value=None,
            limit=FORMATS.get(form.dtype, FLOAT32).largest,
            outside=BACKWARD,
        )
        entry.take_lost(lost, form.axes, None)
        observer.entries.append(entry)
        observer.broken = True
        row = tally(values, form.edges, None)
        if isinstance(row, Tensor):

            def take(row: Row) -> None:
                entry.row = row

            observer.pending.after(row, take, [values])
        else:
            entry.row = row


def _gradient(held: Tensor) -> Tensor | None:
    """The elements of a parameter's gradient that can be looked at; None for none."""
    grad = held.grad
    if grad is not None and grad.layout is torch.sparse_coo:
        grad = grad._values()
    return grad if grad is not None and has_elements(grad) and not grad.is_meta and grad.numel() else None


def _are_finite(tensors: list[Tensor | None]) -> list[bool]:
    """One wait for each device."""
    flags = [tensor.isfinite().all() for tensor in tensors if tensor is not None]
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        by_device.setdefault(flag.device, []).append(flag)
    told = {device: iter(torch.stack(some).tolist()) for device, some in by_device.items()}
    return [next(told[flag.device]) for flag in flags]


def _intercept() -> None:
    """Puts ours in the place of the function through which torch starts its engine, where this torch has it."""
    engine = getattr(torch.autograd.graph, "_engine_run_backward", None)
    if engine is None:
        return

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        watchers = _watchers.get(get_ident())
        if not watchers:  # another's
            return engine(*args, **kwargs)
        inside = torch._C._current_graph_task_id() != -1
        with ExitStack() as stack:
            for watcher in watchers:
                if watcher.gradients is not None and not watcher.gradients.busy and not _makes_a_graph(args, kwargs):
                    stack.enter_context(watcher.gradients.watch(args[0]))
            if inside:
                return engine(*args, **kwargs)
            stack.enter_context(unwatched())
            result = engine(*args, **kwargs)
        for watcher in tuple(watchers):
            watcher.ended()
        return result

    for holder in (torch.autograd, torch.autograd.graph):
        if getattr(holder, "_engine_run_backward", None) is engine:
            holder._engine_run_backward = run_backward  # type: ignore[attr-defined]
            _engines.append((holder, engine, run_backward))


def _makes_a_graph(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether gradients are to be differentiated again."""
    return bool(args[3] if len(args) > 3 else kwargs.get("create_graph", False))


def _let_go() -> None:
    for holder, engine, ours in _engines:
        if holder._engine_run_backward is ours:  # else somebody put theirs around it, and ours hands on
            holder._engine_run_backward = engine
    _engines.clear()
