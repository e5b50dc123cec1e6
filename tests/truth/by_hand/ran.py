"""What a run of a planted fault comes to: its numbers, whether they are finite, how far from those of another run."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessor

from truth.by_hand import Change
from truth.by_hand.rounded import rounded
from truth.row import Planted

FLOAT16_STEP = 2.0**-24  # between its smallest numbers


@dataclass(frozen=True, slots=True)
class Ran:
    """`values` in float64: what the run returned, and the gradients that it left. `error` is what it raised.

    `finite` asks of generation, too, that a token is left to be chosen in every row.
    """

    values: tuple[Tensor, ...]
    finite: bool
    error: str | None = None
    processors: tuple[str, ...] = ()


def unchanged(planted: Planted, stack: ExitStack) -> Any:
    return planted.model


def ran(planted: Planted, change: Change = unchanged) -> Ran | None:
    """The run with a change; None where the change does not apply."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = change(planted, stack)
        if model is None:
            return None
        seen = _Chosen()
        if hasattr(planted.model, "_get_logits_processor"):
            seen.attach(planted.model, stack)
        mode: AbstractContextManager[Any] = nullcontext() if planted.grad else torch.no_grad()
        torch.manual_seed(1)
        try:
            with mode:
                result = planted.run(model)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            return Ran((), False, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", seen.names)
        values = [
            _wide(one) for one in tree_leaves(dict(result) if hasattr(result, "keys") else result) if _counts(one)
        ]
        if planted.grad:
            values += [_wide(p.grad) for p in planted.model.parameters() if p.grad is not None]
    return Ran(tuple(values), all(bool(v.isfinite().all()) for v in values) and seen.sound, None, seen.names)


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.is_nested and leaf.numel() > 0


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.float() if tensor.element_size() == 1 else tensor).double()


class _Chosen(LogitsProcessor):
    """The last of the processors of a model: looks at what is left to choose from. An assistant is passed it, too."""

    def __init__(self) -> None:
        self.sound = True
        self.names: tuple[str, ...] = ()
        self.model: Any = None
        self.last: Any = None  # the model that was called

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.last is self.model:
            left = (scores > -torch.inf).any(-1)
            self.sound = self.sound and bool(left.all()) and not bool(scores.isnan().any() | scores.isposinf().any())
        return scores

    def called(self, module: nn.Module, args: Any, output: Any) -> None:
        if hasattr(module, "generate"):
            self.last = module

    def attach(self, model: Any, stack: ExitStack) -> None:
        self.model = model
        stack.callback(register_module_forward_hook(self.called).remove)
        made = model._get_logits_processor

        def also(*args: Any, **kwargs: Any) -> Any:
            processors = made(*args, **kwargs)
            self.names = tuple(type(one).__name__ for one in processors)
            return type(processors)([*processors, self])

        model._get_logits_processor = also


def errors(one: Ran, other: Ran) -> Tensor:
    """The largest difference in each row (what a last dimension holds), in parts of the largest magnitude of the tensor
    of `other` that it belongs to, over all that both returned; infinite where they did not return the same.
    """
    if [v.shape for v in one.values] != [v.shape for v in other.values]:
        return torch.tensor([torch.inf])
    found = [torch.zeros(1, dtype=torch.float64)]
    for a, b in zip(one.values, other.values, strict=True):
        difference = (a - b).abs().nan_to_num(torch.inf, torch.inf)
        size = float(b.abs().max())
        rows = difference.reshape(-1, b.shape[-1] if b.ndim else 1).amax(-1)
        found.append((rows - FLOAT16_STEP).clamp(min=0) / (size or 1.0))
    return torch.cat(found)


def lost_rows(one: Ran) -> Tensor:
    """Which of the rows that `errors` is about hold no finite numbers."""
    found = [(~v.isfinite()).reshape(-1, v.shape[-1] if v.ndim else 1).any(-1) for v in one.values]
    return torch.cat([torch.zeros(1, dtype=torch.bool), *found])


def reachable(build: Callable[[], Planted], reference: Ran, bits: int) -> Tensor:
    """The same of runs that hold any size of number and round every result to so many bits: to the nearest, and, since
    one run may be lucky, up and down.
    """
    runs = [ran(build(), rounded(bits, way)) for way in (torch.round, torch.floor, torch.ceil)]
    found = [errors(one, reference) for one in runs if one is not None and one.finite]
    found = [one for one in found if bool(one.isfinite().all())]
    return torch.stack(found).amax(0) if found else torch.zeros_like(errors(reference, reference))
