"""What a run gives: the outputs of every call of the model, what its caller gets, gradients, and what was raised."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.matmul import matmul
from stabilitykit.recorder.record import unrecorded
from stabilitykit.trials.recast import Recast
from stabilitykit.trials.reproduction import Reproduction, same_draws
from stabilitykit.trials.sampling import Choices

_KEPT = 1 << 26  # elements of an output that are kept to compare; of more, rows evenly spaced, the last one among them
_CACHES = ("past", "cache")

Change = AbstractContextManager[Any]


@dataclass(frozen=True, slots=True)
class Output:
    """`values` [N, V] are the rows of a tensor of `shape` [..., V] that were kept, `rows` their numbers in it.

    `logits`: they are scores of V choices. `lost` are the numbers of all rows that hold NaN or infinities; -inf is
    none of these among scores, where it stands for a choice that was taken away, unless nothing is left.
    """

    values: Tensor
    rows: Tensor
    shape: tuple[int, ...]
    lost: tuple[int, ...]
    logits: bool

    def place(self, row: int) -> tuple[int, int | None]:
        """The batch row and the position of a row, None where the tensor has no positions."""
        if len(self.shape) < 3:
            return row, None
        inner = 1
        for size in self.shape[1:-1]:
            inner *= size
        return row // inner, row % inner

    def first(self, rows: int) -> "Output":
        """The first so many rows of a batch, of an output of which all rows were kept."""
        shape = (rows, *self.shape[1:])
        most = math.prod(shape[:-1])
        kept = self.rows < most
        lost = tuple(row for row in self.lost if row < most)
        return Output(self.values[kept.to(self.values.device)], self.rows[kept], shape, lost, self.logits)

    @classmethod
    def joined(cls, parts: Sequence["Output"]) -> "Output":
        """The rows of several batches as one, of outputs of which all rows were kept."""
        shape = (sum(one.shape[0] for one in parts), *parts[0].shape[1:])
        rows, lost, before = [], [], 0
        for one in parts:
            rows.append(one.rows + before)
            lost += [row + before for row in one.lost]
            before += math.prod(one.shape[:-1])
        return cls(torch.cat([one.values for one in parts]), torch.cat(rows), shape, tuple(lost), parts[0].logits)


@dataclass(slots=True)
class Answers:
    """`given` holds, for each output, the integers that the call was given: outputs are compared as long as these are
    alike. `tokens` are the integers that the caller gets. `recast`: how many operators asked for a narrow dtype.
    """

    outputs: list[Output] = field(default_factory=list)
    given: list[tuple[Tensor, ...]] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    error: str | None = None
    recast: int = 0

    @property
    def finite(self) -> bool:
        return self.error is None and not any(output.lost for output in self.outputs)


def answers(
    reproduction: Reproduction,
    model: nn.Module,
    *,
    around: Change | None = None,
    recast: Recast | None = None,
    recorder: Change | None = None,
) -> Answers:
    """Runs `model` inside `recast`, `around` and `recorder`, entered in this order, and keeps what it gives.

    Of a run that needs gradients, those that it leaves at the model's weights are outputs too, and none is scores.
    Whatever is raised becomes the `error`; so does a choice among no tokens, at which greedy decoding raises nothing.
    """
    found = Answers()
    seen: list[Tensor] = []
    choices = Choices()

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        with unrecorded():  # what is computed here is no part of the run that is changed
            for tensor, logits in outputs_of(module, output):
                found.outputs.append(_kept(tensor, logits and not reproduction.grad))
                found.given.append(_integers((args, kwargs)))
                seen.append(tensor)

    result: Any = None
    model.zero_grad()  # of a run before
    try:
        with ExitStack() as stack:
            stack.enter_context(same_draws())
            stack.enter_context(torch.enable_grad() if reproduction.grad else torch.inference_mode())
            stack.callback(model.register_forward_hook(hook, with_kwargs=True).remove)
            stack.enter_context(choices.seen(model))
            if reproduction.matmul is not None:
                stack.enter_context(matmul(reproduction.matmul))
            for one in (recast, around, recorder):
                if one is not None:
                    stack.enter_context(one)
            result = reproduction.run(model)
    except MisuseError:
        raise
    except Exception as error:
        found.error = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
    if found.error is None and not any(output.lost for output in found.outputs):
        found.error = choices.problem
    found.recast = 0 if recast is None else recast.changed
    ends = {one.data_ptr() for one in seen if one.numel()}
    for tensor, logits in outputs_of(model, result):
        if not tensor.numel() or tensor.data_ptr() not in ends:
            found.outputs.append(_kept(tensor, logits and not reproduction.grad))
            found.given.append(())
    if reproduction.grad:  # first, for a caller may get more or fewer tensors in another dtype
        gradients = [_kept(held.grad, logits=False) for held in model.parameters() if held.grad is not None]
        found.outputs[:0] = gradients
        found.given[:0] = [()] * len(gradients)
    found.tokens = list(_integers(_plain(result)))
    return found


def _integers(tree: Any) -> tuple[Tensor, ...]:
    return tuple(
        leaf.detach().clone()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and not leaf.is_floating_point() and not leaf.is_complex()
    )


def outputs_of(module: nn.Module, output: Any) -> Iterator[tuple[Tensor, bool]]:
    """The floating tensors of an output, caches left out, and whether each holds scores of choices."""
    held = _plain(output)
    if isinstance(held, Mapping):
        for name, value in held.items():
            if not any(part in str(name) for part in _CACHES):
                for leaf in tree_leaves(value):
                    if _is_numbers(leaf):
                        yield leaf.detach(), "logits" in str(name) or str(name) == "scores"
        return
    for leaf in tree_leaves(held):
        if _is_numbers(leaf):
            yield leaf.detach(), isinstance(module, Gemma) or leaf.shape[-1:] == (_vocabulary(module),)


def _vocabulary(module: nn.Module) -> int | None:
    config: Any = getattr(module, "config", None)
    return getattr(config, "vocab_size", None)


def _plain(output: Any) -> Any:
    return dict(output) if hasattr(output, "keys") else output


def _is_numbers(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.is_nested and leaf.layout == torch.strided


def _lost(rows: Tensor, logits: bool) -> Tensor:
    finite = rows.isfinite()
    if not logits:
        return ~finite.all(-1)
    return rows.isnan().any(-1) | (rows == torch.inf).any(-1) | ~finite.any(-1)


def _kept(tensor: Tensor, logits: bool) -> Output:
    shape = tuple(tensor.shape) or (1,)
    rows = tensor.reshape(-1, shape[-1]) if tensor.numel() else tensor.reshape(0, 1)
    if rows.element_size() == 1:
        rows = rows.float()
    lost = tuple(_lost(rows, logits).nonzero()[:, 0].tolist())
    places = torch.arange(len(rows))
    most = max(1, _KEPT // max(1, rows.shape[1]))
    if len(rows) > most:
        places = torch.linspace(0, len(rows) - 1, most, dtype=torch.float64).round().long()
    values = rows[places.to(rows.device)] if len(places) < len(rows) else rows.clone()
    return Output(values.cpu() if values.device.type == "mps" else values, places, shape, lost, logits)
