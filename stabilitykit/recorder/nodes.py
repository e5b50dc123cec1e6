"""Which node of autograd's graph belongs to which record of the forward pass.

Autograd numbers its nodes in the order in which it makes them, each just before its operator runs; so a mode that sees
an operator knows its node's number, though not yet the node.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.models.operators import Traits, common_name
from stabilitykit.recorder.derivatives import Forward, Hole
from stabilitykit.recorder.entry import Entry
from stabilitykit.recorder.hooks import ModuleHooks
from stabilitykit.recorder.names import Names, site_path
from stabilitykit.recorder.observe import Observer
from stabilitykit.recorder.origins import Origin
from stabilitykit.recorder.tensors import floating, has_elements


class Nodes:
    """Follows the forward passes, those too that a backward pass runs again."""

    def __init__(self, model: nn.Module, observer: Observer, names: Names) -> None:
        self._model = model
        self._observer = observer
        self._names = names
        self._forward: dict[int, Forward] = {}  # by the number that autograd gave to the node
        self._by_path: dict[str, Entry] = {}

    def of(self, node: Any) -> Forward | None:
        """What ran when autograd made a node, if it has a record."""
        return self._forward.get(node._sequence_nr())

    def attach(self, stack: ExitStack) -> None:
        """Follows the modules that run again inside a backward pass, until the end of `stack`."""
        hooks, thread = ModuleHooks(self._model, stack), get_ident()

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            pass

        def leave(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() == -1 or get_ident() != thread or path not in self._by_path:
                return
            for tensor in floating(output)[:1]:
                self._remember(tensor, self._by_path[path], packed=True)

        for name, module in self._model.named_modules():
            hooks.attach(module, enter, partial(leave, site_path(name)))

    def operator(self, kind: Traits, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> None:
        """An operator ran, and its results have records: autograd made its node just before."""
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        lists = [one for some in args if isinstance(some, list | tuple) for one in some if isinstance(one, Tensor)]
        if not any(one.requires_grad for one in (*given, *lists)):
            return
        entries = self._entries_of(outputs)
        if not entries:
            return
        number = torch._C._autograd._get_sequence_nr() - 1
        if number in self._forward:
            return
        arguments = kind.func._schema.arguments
        packed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        held = tuple(self._hole(argument.name, one) for argument, one in zip(arguments, args, strict=False))
        named = {name: self._hole(name, one) for name, one in kwargs.items()}
        func = None if lists else kind.func
        result = _light(self._names.origins.of(outputs[0]))
        self._forward[number] = Forward(func, kind.name, held, named, entries, packed, result)

    def module(self, path: str, tensor: Tensor) -> None:
        """A module's output has a record."""
        number = self._names.origins.of(tensor).entry
        if number is None or torch._C._current_graph_task_id() != -1:
            return
        entry = self._by_path[path] = self._observer.entries[number]
        whole = tensor.is_contiguous() and tensor.numel() == math.prod(entry.form.shape)
        if tensor.grad_fn is not None and whole:
            self._remember(tensor, entry, packed=True)

    def _remember(self, tensor: Tensor, entry: Entry, *, packed: bool) -> None:
        node: Any = tensor.grad_fn
        if node is None or is_leaf(node):
            return
        number = node._sequence_nr()
        known = self._forward.get(number)
        if known is None:
            self._forward[number] = Forward(None, operator_of(node), (), {}, {tensor.output_nr: entry}, packed)
        else:
            known.entries.setdefault(tensor.output_nr, entry)

    def _entries_of(self, outputs: Sequence[Tensor]) -> dict[int, Entry]:
        found = {}
        for place, tensor in enumerate(outputs):
            number = self._names.origins.of(tensor).entry
            if number is not None:
                found[place] = self._observer.entries[number]
        return found

    def _hole(self, name: str, argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return None if isinstance(argument, list | tuple) and _holds_tensors(argument) else argument
        origin = self._names.origins.of(argument) if has_elements(argument) else Origin("constant", name)
        floats = argument.is_floating_point() or argument.is_complex()
        return Hole(name, tuple(argument.shape), floats, _light(origin))

    def forget(self) -> None:
        """The block has ended."""
        self._forward.clear()
        self._by_path.clear()


def _light(origin: Origin) -> Origin:
    """The same without what it remembers of tensors, which would keep them alive."""
    return Origin(origin.kind, origin.name, origin.entry, lost=origin.lost)


def _holds_tensors(argument: Sequence[Any]) -> bool:
    return any(isinstance(one, Tensor) for one in argument)


def is_leaf(node: Any) -> bool:
    return bool(node.name().endswith("AccumulateGrad"))


@cache
def _operator(node: str) -> str:
    """`matmul` of MmBackward0, `to_copy` of ToCopyBackward0."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", node.rpartition("::")[2].partition("Backward")[0]).lower()
    return common_name({"to_copy": "_to_copy", "unsafe_view": "view"}.get(words, words))


def operator_of(node: Any) -> str:
    """The operator that a node differentiates, by the name of the node."""
    return _operator(node.name())


def edge(root: Any) -> tuple[Any, int]:
    """The node, and the number of its output, at which a pass begins: None for a leaf."""
    if isinstance(root, Tensor):
        return root.grad_fn, root.output_nr
    return root.node, root.output_nr


def graph(roots: Sequence[Any]) -> Iterator[Any]:
    """Every node that these can reach, once."""
    seen, found = set(roots), list(dict.fromkeys(roots))
    for node in found:
        yield node
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                found.append(source)
