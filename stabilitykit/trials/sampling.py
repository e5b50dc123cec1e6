"""How `generate` chooses tokens: its settings and its logits processors, changed for the time of a run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.models.gemma.sampler import Sampler
from stabilitykit.recorder.record import unrecorded
from stabilitykit.trials.attributes import attribute

_LISTS = "_get_logits_processor"  # of transformers' models: makes the processors of one call of generate
_EVERYTHING = 1 << 30  # more tokens than any vocabulary has


@contextmanager
def processors(model: nn.Module, change: Callable[[list[Any], Any], Sequence[Any]]) -> Iterator[None]:
    """Gives `change` the processors that a call of `generate` has, and its settings; what it returns takes their place.

    Nothing changes in a model that is none of transformers'.
    """
    with ExitStack() as stack:
        for module in list(model.modules()):
            if hasattr(module, _LISTS):
                stack.enter_context(attribute(module, _LISTS, _changing(getattr(module, _LISTS), change)))
        yield


def _changing(made: Callable[..., Any], change: Callable[[list[Any], Any], Sequence[Any]]) -> Callable[..., Any]:
    def lists(*args: Any, **kwargs: Any) -> Any:
        found = made(*args, **kwargs)
        return type(found)(change(list(found), args[0] if args else kwargs.get("generation_config")))

    return lists


@contextmanager
def settings(model: nn.Module, *, greedy: bool = False, top_k: bool = True, top_p: bool = True) -> Iterator[None]:
    """Calls of `generate`, and of the kit's own sampler, are greedy, or do without top-k or top-p."""
    how: dict[str, Any] = {"do_sample": False} if greedy else {}
    own: dict[str, Any] = {"temperature": None} if greedy else {}
    if not top_k:
        how, own = how | {"top_k": 0}, own | {"top_k": _EVERYTHING}
    if not top_p:
        how, own = how | {"top_p": 1.0}, own | {"top_p": 1.0}
    with ExitStack() as stack:
        for module in list(model.modules()):
            if hasattr(module, _LISTS) and hasattr(module, "generate"):
                stack.enter_context(attribute(module, "generate", _with(module.generate, how)))
            elif isinstance(module, Sampler):
                stack.enter_context(attribute(module, "forward", _with(module.forward, own)))
        yield


def _with(call: Any, how: dict[str, Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: call(*args, **kwargs | how)


class Choices:
    """The last of the processors: sees what a token is chosen from. `problem` is what is wrong with it, or None.

    Greedy decoding raises nothing where no token is left, and takes token 0.
    """

    def __init__(self) -> None:
        self.problem: str | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.problem is None:
            with unrecorded():
                if bool((scores.isnan() | (scores == torch.inf)).any()):
                    self.problem = "The scores that a token is chosen from are not finite."
                elif not bool(scores.isfinite().any(-1).all()):
                    self.problem = "No token is left to choose from: every score is -inf."
        return scores

    def seen(self, model: nn.Module) -> Any:
        return processors(model, lambda found, config: [*found, self])
