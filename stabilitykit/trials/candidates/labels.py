"""A loss that is a mean over no labels."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stabilitykit.diagnosis.outside import of_labels
from stabilitykit.trials.altered import Altered
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import Situation

NAME = "one label that counts"
_IGNORED = -100  # what losses of torch and transformers ignore unless they are told otherwise


def counting_label(situation: Situation) -> Iterator[Candidate]:
    """Where every label is one that the loss ignores."""
    broke = situation.broke
    if broke is None or broke.broke is None or of_labels(broke) is None:
        return
    yield Candidate(
        name=NAME,
        summary="Sets the last label to a token, for every one of them is ignored: the loss is then a mean over one.",
        command=f"# leave out batches without a label that counts: bool((labels != {_IGNORED}).any())",
        instead=Altered(situation.reproduction, _around),
    )


@contextmanager
def _around(model: nn.Module) -> Iterator[None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {name: _counting(one) if name == "labels" else one for name, one in kwargs.items()}

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.enter_context(_Losses())
        yield


def _counting(labels: Any, ignored: int = _IGNORED) -> Any:
    """Labels of which the last is a token, where none was."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.numel():
        return labels
    if not bool((labels == ignored).all()):
        return labels
    made = labels.clone()
    made.view(-1)[-1] = 0
    return made


class _Losses(TorchFunctionMode):
    """The same for losses that are called outside of the model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (nn.functional.cross_entropy, nn.functional.nll_loss):
            ignored = kwargs.get("ignore_index", args[4] if len(args) > 4 else _IGNORED)
            if len(args) > 1:
                args = (args[0], _counting(args[1], ignored), *args[2:])
            elif "target" in kwargs:
                kwargs["target"] = _counting(kwargs["target"], ignored)
        return func(*args, **kwargs)
