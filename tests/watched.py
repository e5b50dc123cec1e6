"""A small model around a function, and what a recording must leave as it was."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stabilitykit.recorder import record
from stabilitykit.records import Level, Recording

LEVELS: tuple[Level, ...] = get_args(Level)

X = torch.linspace(-1, 1, 2 * 7 * 8).reshape(2, 7, 8)


class Function(nn.Module):
    """A linear layer and a function of what it makes."""

    def __init__(self, function: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner: nn.Module = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.inner(x))


def bits(tensor: Tensor | None) -> bytes:
    assert tensor is not None
    return tensor.numpy().tobytes()


def unseen(recording: Recording) -> list[str]:
    return [note for note in recording.header.notes if "could not be seen" in note]


def unharmed(model: nn.Module, *args: Any, level: Level = "operators", **kwargs: Any) -> Recording:
    """The recording of a call of `model` which returned the same as without one, and left no hook."""
    given = [one.clone() if isinstance(one, Tensor) else one for one in args]
    expected = copy.deepcopy(model)(*given, **kwargs)
    with warnings.catch_warnings(), record(model, formats=(), level=level) as recording:
        output = model(*args, **kwargs)
    same = zip(tree_leaves(expected), tree_leaves(output), strict=True)
    for one, other in same:
        if isinstance(one, Tensor) and one.layout is torch.strided and not one.is_nested and not one.is_meta:
            assert torch.equal(one.nan_to_num(), other.nan_to_num())
        else:
            assert type(one) is type(other)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    recording.records  # noqa: B018  they can be made
    return recording
