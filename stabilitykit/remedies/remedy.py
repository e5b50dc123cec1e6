"""A remedy: a change to a model, or to its arithmetic, that is meant to keep it finite in float16."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from torch import nn

from stabilitykit.checkpoints import Checkpoint, GemmaConfig

Around = Callable[[nn.Module], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """`dtype` is the one in which the weights are stored and the model computes.

    `change` returns the checkpoint to load. `around` is entered while the model runs, the kit's own or transformers',
    and leaves no trace. `extra` is how many bytes a pass of so many tokens takes in addition to a plain one's.
    `exportable`: the weights and the config carry all of it, so that a folder can.
    """

    name: str
    summary: str
    dtype: str = "float16"
    change: Callable[[Checkpoint], Checkpoint] = lambda checkpoint: checkpoint
    around: Around = lambda model: nullcontext()
    extra: Callable[[GemmaConfig, int], int] = lambda config, tokens: 0
    exportable: bool = True

    def __add__(self, other: "Remedy") -> "Remedy":
        """Both at once: the other's change after this one's, and both around the run in the other's dtype."""

        @contextmanager
        def around(model: nn.Module) -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(self.around(model))
                stack.enter_context(other.around(model))
                yield

        return Remedy(
            name=f"{self.name} + {other.name}",
            summary=f"{self.summary} {other.summary}",
            dtype=other.dtype,
            change=lambda checkpoint: other.change(self.change(checkpoint)),
            around=around,
            extra=lambda config, tokens: self.extra(config, tokens) + other.extra(config, tokens),
            exportable=self.exportable and other.exportable,
        )
