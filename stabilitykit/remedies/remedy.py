"""A remedy: a change to a model, or to its arithmetic, that is meant to keep it finite in float16."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from torch import nn

from stabilitykit.records.scaling import UNCHANGED, Scaling

Around = Callable[[nn.Module], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """`dtype` is the one in which the weights are stored and the model computes.

    `scaling` multiplies weights and settings before they are rounded to it. `around` is entered while the model runs,
    and leaves no trace. `extra` is how many bytes a pass of so many tokens takes in addition to a plain one's.
    `exportable`: the weights and the config carry all of it, so that a folder can. `lossy`: it puts other numbers in
    the place of what is lost.
    """

    name: str
    summary: str
    dtype: str = "float16"
    scaling: Scaling = UNCHANGED
    around: Around = lambda model: nullcontext()
    extra: Callable[[int], int] = lambda tokens: 0
    exportable: bool = True
    lossy: bool = False

    def __add__(self, other: "Remedy") -> "Remedy":
        """Both at once: this one's scaling, and both around the run in the other's dtype.

        The other must scale nothing.
        """
        assert other.scaling == UNCHANGED

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
            scaling=self.scaling,
            around=around,
            extra=lambda tokens: self.extra(tokens) + other.extra(tokens),
            exportable=self.exportable and other.exportable,
        )


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A remedy that does not apply to a model, and a sentence that says why."""

    name: str
    why: str
