"""Gradients by site: each is measured in autograd's own hooks, on its way from one node of the graph to the next.

Nothing of autograd is changed, and no mode watches it: a hook before a node sees the gradient of what that node made in
the forward pass, complete, and a hook after it the gradients of its operands. Both are there for the length of one
backward pass. No gradient is kept: of each that is on its way it is remembered whether it is finite, and what was
counted of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.formats import FLOAT32, FORMATS
from stabilitykit.recorder.breaks import Finding, break_at, kind_of
from stabilitykit.recorder.derivatives import Element, Forward, element
from stabilitykit.recorder.entry import Entry
from stabilitykit.recorder.kernels.axes import Axes
from stabilitykit.recorder.kernels.layout import Field, edges
from stabilitykit.recorder.names import Names, site_path
from stabilitykit.recorder.nodes import Nodes, edge, graph, is_leaf, operator_of
from stabilitykit.recorder.observation import form_of
from stabilitykit.recorder.observe import Observer
from stabilitykit.recorder.origins import Origin
from stabilitykit.recorder.pending import Row
from stabilitykit.recorder.statistics import tally
from stabilitykit.recorder.tensors import NAMES, aside, has_elements, measurable, region
from stabilitykit.recorder.unseen import Unseen
from stabilitykit.records import BACKWARD, flat_index, index_at

# They hand on the gradient as it is, in the same order of elements; or place its elements elsewhere.
_RESHAPES = frozenset("view reshape_alias unsqueeze squeeze alias clone contiguous".split())
_MOVES = _RESHAPES | frozenset("t transpose permute cat split slice select unbind stack chunk as_strided".split())

_LOST = (Field.NAN, Field.PLUS, Field.MINUS)


@dataclass(slots=True)
class _Sent:
    """A gradient on its way to a node: what was counted of it, and why it is lost if a node made it so."""

    row: Row | None
    amax: float
    lost: bool
    by: str
    finding: Finding | None = None
    index: tuple[int, ...] = ()  # of the element that the finding is about, as far as it could be followed


@dataclass(slots=True)
class _Given:
    """What a node was given: whether it was finite, what made it, its record, and a break that has no record yet.

    `breaks` is how many there were when the node began.
    """

    lost: bool = False
    row: Row | None = None
    by: str | None = None
    origin: Origin | None = None
    finding: Finding | None = None
    index: tuple[int, ...] = ()
    breaks: int = 0


@dataclass(slots=True, eq=False)
class _Pass:
    """One backward pass: the nodes of its graph by number, and what is on its way between them."""

    nodes: list[Any]
    numbers: dict[Any, int]
    sent: dict[tuple[int, int], list[_Sent]] = field(default_factory=dict)
    given: dict[int, _Given] = field(default_factory=dict)
    roots: set[tuple[int, int]] = field(default_factory=set)
    records: dict[int, tuple[Entry, int]] = field(default_factory=dict)  # the last ones, by the forward pass's


class Gradients:
    """Records the gradients of whatever has a record, and of parameters, in every backward pass that it is given.

    `loss_scale` is what the loss was multiplied by in the pass of the first break, else in the last one.
    """

    def __init__(self, model: nn.Module, observer: Observer, names: Names, nodes: Nodes, unseen: Unseen) -> None:
        self._model = model
        self._observer = observer
        self._names = names
        self._unseen = unseen
        self._nodes = nodes
        self._parameters: dict[int, str] = {}
        self.lost: set[int] = set()  # the parameters whose gradients are not finite, of which a record says so
        self._lock = RLock()
        self._busy = False
        self._breaks = 0
        self._unlanded: Finding | None = None  # made in a pass inside a node, and of no record yet
        self._told: list[Finding] = []
        self.loss_scale: float | None = None

    @contextmanager
    def watch(self, roots: Sequence[Any]) -> Iterator[None]:
        """Around one backward pass from these tensors, or edges of a graph. No hook outlives it."""
        with ExitStack() as stack:
            with self._unseen.guard("the graph of a backward pass"), aside():
                self._begin(roots, stack)
            yield

    @property
    def busy(self) -> bool:
        """Whether a pass is the kit's own, for one element of a gradient."""
        return self._busy

    def _begin(self, roots: Sequence[Any], stack: ExitStack) -> None:
        starts = [edge(root) for root in roots]
        nodes = list(graph([node for node, _ in starts if node is not None]))
        run = _Pass(nodes, {node: number for number, node in enumerate(nodes)})
        run.roots = {(run.numbers[node], output) for node, output in starts if node is not None}
        self._parameters = {id(held): site_path(name) for name, held in reversed(list(self._model.named_parameters()))}
        if torch._C._current_graph_task_id() == -1:
            self._look_for_scale([node for node, _ in starts])
        for number, node in enumerate(nodes):
            leaf = is_leaf(node)
            before = self._leaf if leaf else self._before
            stack.callback(node.register_prehook(partial(self._guarded, before, run, number)).remove)
            if not leaf:
                stack.callback(node.register_hook(partial(self._guarded, self._after, run, number)).remove)
        if torch._C._current_graph_task_id() == -1:
            self._unlanded = None

    def _look_for_scale(self, nodes: Sequence[Any]) -> None:
        """The constant that a loss was multiplied by last, as GradScaler does."""
        for node in nodes:
            if node is None or not node.name().startswith("MulBackward") or self._breaks:
                continue
            sides = [source is None for source, _ in node.next_functions]
            if sides in ([False, True], [True, False]):
                scale = node._saved_other if sides[1] else node._saved_self
                if scale is not None and scale.numel() == 1:
                    self.loss_scale = float(scale)

    def _guarded(self, look: Callable[..., None], *args: Any) -> None:
        """Hooks run in autograd's thread of the node's device, and none of them may raise into it."""
        with self._lock, self._unseen.guard("a gradient", "a gradient"), aside():
            self._busy = True
            try:
                look(*args)
            finally:
                self._busy = False

    def _before(self, run: _Pass, number: int, grads: Sequence[Tensor | None]) -> None:
        """A node is about to run: the gradients of what it made are complete."""
        node = run.nodes[number]
        given = run.given[number] = _Given(breaks=self._breaks)
        forward = self._nodes.of(node)
        for output, grad in enumerate(grads):
            if grad is None or not _is_measured(grad):
                continue
            sent = run.sent.pop((number, output), [])
            entry = None if forward is None else forward.entries.get(output)
            finding = self._arrived(run, number, output, sent)
            given.by = sent[0].by if len(sent) == 1 else "add" if sent else None
            made, at = run.records.get(id(entry), (None, 0))
            if made is not None and len(sent) == 1 and sent[0].row is made.row:  # a view of what has its record
                given.row, given.lost = made.row, given.lost or self._is_lost(made)
                given.origin = Origin("computed", made.site, at, lost=given.lost)
                continue
            if entry is None:
                row = sent[0].row if len(sent) == 1 else None
                lost = sent[0].lost if len(sent) == 1 else bool(_count(self._tally(grad), *_LOST))
                if lost and len(sent) > 1 and finding is None and not any(one.lost for one in sent):
                    finding = self._of_sum(sent, grad)
                given.row, given.lost = row, given.lost or lost
                if lost and given.finding is None:
                    given.finding = finding
                    given.index = next((one.index for one in sent if one.finding is finding), ())
                continue
            made = self._record(grad, f"{BACKWARD}/{entry.site}", sent, finding, entry)
            given.row, given.lost = made.row, given.lost or self._is_lost(made)
            at = len(self._observer.entries) - 1
            run.records[id(entry)] = made, at
            if output == 0:
                given.origin = Origin("computed", made.site, at, lost=given.lost)

    def _after(self, run: _Pass, number: int, made: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
        """A node has run, and what it saved is still there."""
        node, given = run.nodes[number], run.given.pop(number, None)
        if given is None:
            return
        forward = self._nodes.of(node)
        name = operator_of(node) if forward is None else forward.name
        reshapes = name in _RESHAPES and len(made) == 1
        by = given.by or name if name in _MOVES else name
        for place, ((source, output), grad) in enumerate(zip(node.next_functions, made, strict=False)):
            if source is None or grad is None or not _is_measured(grad) or source not in run.numbers:
                continue
            row = given.row if reshapes else None
            if row is None:
                row = self._tally(grad)
            lost = bool(_count(row, *_LOST))
            finding: Finding | None = None
            index: tuple[int, ...] = ()
            if lost and given.lost:
                finding, index = given.finding, _moved(given.index, name, grads, grad)
            elif lost and self._unlanded is not None:
                finding = self._unlanded
            elif lost and self._breaks == given.breaks:
                finding, index = self._judge(node, forward, place, grad, grads, given)
            sent = _Sent(row, float(row[Field.AMAX]), lost, by, finding, index)
            run.sent.setdefault((run.numbers[source], output), []).append(sent)

    def _leaf(self, run: _Pass, number: int, grads: Sequence[Tensor | None]) -> None:
        """A leaf is about to be given a gradient, which is added to the one that it has."""
        (grad,), held = grads, run.nodes[number].variable
        sent = run.sent.pop((number, 0), [])
        name = self._parameters.get(id(held))
        if name is None:
            origin = self._names.origins.of(held)
            if origin.kind == "computed" or origin.name == "a tensor":
                self._unlanded = self._arrived(run, number, 0, sent) or self._unlanded
                return
            name = origin.name
        if grad is None:
            return
        if grad.layout is torch.sparse_coo:
            grad = grad._values()
        if not _is_measured(grad):
            return
        finding = self._arrived(run, number, 0, sent)
        before = held.grad
        if before is not None and has_elements(before) and before.shape == grad.shape:
            whole = before + grad
            row = self._tally(whole)
            if _count(row, *_LOST) and not any(one.lost for one in sent):
                finding = None if id(held) in self.lost else self._of_accumulation(name, before, grad, whole)
            sent, grad = [_Sent(row, 0.0, False, "add" if finding else sent[0].by if sent else "add")], whole
        made = self._record(grad, f"{BACKWARD}/{name}", sent, finding, None)
        made.of_weight = id(held) in self._parameters
        if self._is_lost(made):
            self.lost.add(id(held))

    # What was seen

    def _record(
        self, grad: Tensor, site: str, sent: Sequence[_Sent], finding: Finding | None, entry: Entry | None
    ) -> Entry:
        observer = self._observer
        values = measurable(grad)
        shape = tuple(values.shape)
        axes = Axes(shape)
        if entry is not None and math.prod(entry.form.axes.shape) == math.prod(shape):
            axes = entry.form.axes
        step = observer.places.step if entry is None else entry.step
        form = form_of(grad, values, shape, axes, observer.options.formats)
        by = next((one.by for one in sent if finding is not None and one.finding is finding), None)
        if by is None and sent:
            by = sent[0].by if len(sent) == 1 else "add"
        made = Entry(step, BACKWARD, site, by, region(grad), form)
        made.row = sent[0].row if len(sent) == 1 and sent[0].row is not None else self._tally(grad)
        if self._is_lost(made):
            lost = ~values.isfinite()
            made.take_lost(lost, axes, None)
            if finding is None and len(sent) > 1 and not any(one.lost for one in sent):
                finding = self._of_sum(sent, grad)
            if finding is not None:
                self._breaks += 1
                self._told.append(finding)
                where = break_at(finding.broke.kind, lost, axes, FORMATS.get(form.dtype, FLOAT32), BACKWARD)
                told = replace(where, operands=finding.broke.operands, value=finding.broke.value)
                index = next((one.index for one in sent if one.finding is finding), ())
                if entry is None and len(index) == len(shape) and shape:
                    told = replace(told, index=index, channel=index[-1])
                made.take_break(replace(finding, broke=told), axes, None)
                observer.broken = True
        observer.entries.append(made)
        return made

    def _tally(self, grad: Tensor) -> Row:
        """Waits for the device: what autograd frees next cannot be looked at later."""
        values = measurable(grad)
        row = tally(values, edges(values.dtype, self._observer.options.formats), None)
        return row.numpy(force=True) if isinstance(row, Tensor) else row

    @staticmethod
    def _is_lost(entry: Entry) -> bool:
        return entry.row is not None and bool(_count(entry.row, *_LOST))

    def _arrived(self, run: _Pass, number: int, output: int, sent: Sequence[_Sent]) -> Finding | None:
        """A break that came with one of the gradients that were sent here, or with the one that the pass began with."""
        if not sent and (number, output) in run.roots:
            origin = Origin("outside", "the gradient that backward() was given", lost=True)
            return _finding("input", Element(None, (), (origin,)), origin)
        return next((one.finding for one in sent if one.finding is not None and not self._is_told(one.finding)), None)

    def _is_told(self, finding: Finding) -> bool:
        return any(one is finding for one in self._told)

    def _judge(
        self,
        node: Any,
        forward: Forward | None,
        place: int,
        made: Tensor,
        grads: Sequence[Tensor | None],
        given: _Given,
    ) -> tuple[Finding, tuple[int, ...]]:
        """Why a node made what is not finite, of a gradient that is, and at which element."""
        lost = ~made.isfinite()
        index = index_at(int(lost.flatten().int().argmax()), made.shape)
        wanted = place
        if forward is not None and len(forward.holes()) < len(node.next_functions):
            wanted -= sum(source is None for source, _ in node.next_functions[:place])  # of operands without gradient
        first = next((grad for grad in grads if grad is not None), None)
        found = Element(None)
        if first is not None:
            found = element(node, forward, wanted, index, made, first)
        stored = FORMATS.get(NAMES.get(made.dtype, ""), FLOAT32)
        operands = found.operands
        kind = kind_of(operator_of(node) if forward is None else forward.name, found.value, stored)
        origins: tuple[Origin | None, ...] = (given.origin, *found.origins)
        source = None
        if not all(math.isfinite(operand) for operand in operands[1:]):  # saved by the forward pass
            at = next(at for at, operand in enumerate(operands) if at and not math.isfinite(operand))
            source = origins[at] if at < len(origins) else None
            kind = "unresolved"
            if source is not None:
                source = Origin(source.kind, source.name, source.entry, lost=True)
        elif operands:
            at = max(range(len(operands)), key=lambda at: abs(operands[at]))
            source = origins[at] if at < len(origins) else None
        broke = _finding(kind, found, None).broke
        return Finding(broke, origins[: len(operands)], source), index

    @staticmethod
    def _of_sum(sent: Sequence[_Sent], grad: Tensor) -> Finding:
        """Finite gradients of several uses, whose sum is not: of two it is the result that overflows."""
        kind = "overflow" if len(sent) == 2 else "unresolved"
        return _finding(kind, Element(None, tuple(one.amax for one in sent)), None)

    @staticmethod
    def _of_accumulation(name: str, before: Tensor, grad: Tensor, whole: Tensor) -> Finding:
        """What a pass adds to a parameter's gradient: it was lost before, or the sum overflows."""
        index = index_at(int((~whole.isfinite()).flatten().int().argmax()), whole.shape)
        held = Origin("outside", f"{name}.grad", lost=not bool(before[index].isfinite()))
        if held.lost:
            return _finding("input", Element(None, (float(before[index]),), (held,)), held)
        operands = float(before[index]), float(grad[index])
        return _finding("overflow", Element(sum(operands), operands, (held, None)), held)


def _finding(kind: Any, found: Element, source: Origin | None) -> Finding:
    blank = break_at(kind, torch.ones(1, dtype=torch.bool), Axes((1,)), FLOAT32, BACKWARD)
    broke = replace(blank, operands=found.operands, value=found.value, index=())
    return Finding(broke, found.origins, source)


def _moved(index: tuple[int, ...], operator: str, grads: Sequence[Tensor | None], made: Tensor) -> tuple[int, ...]:
    """Where an element of a gradient is in what a node made of it; nowhere where that was not followed."""
    given = next((grad for grad in grads if grad is not None), made)
    if len(index) != given.ndim:
        return ()
    if operator == "t":
        return index[::-1]
    if operator in _RESHAPES and given.numel() == made.numel():
        return index_at(flat_index(index, given.shape), made.shape)
    return ()


def _count(row: Row, *of: Field) -> float:
    return float(sum(row[one] for one in of))


def _is_measured(grad: Tensor) -> bool:
    return has_elements(grad) and not grad.is_meta and grad.numel() > 0
