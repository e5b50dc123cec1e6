"""A candidate: one change that may cure a failure, ready to be tried on it."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn

from stabilitykit.records.scaling import UNCHANGED, Scaling
from stabilitykit.remedies.remedy import Around, LeftOut, Remedy
from stabilitykit.trials.altered import Altered
from stabilitykit.trials.situation import Situation


def _nothing(model: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """`scaling` multiplies weights and settings before they are rounded; `around` is entered while the model runs, and
    leaves no trace; `instead` is run in the place of the failing run, and compared with its own float32 run. `dtype` is
    the one to compute in, None for the failing one. `reference` is entered around the float32 run to compare with,
    where float32 fails too without the change. `lossy`: it puts other numbers in the place of what is lost. `carried`:
    weights and settings say all of it. `extra` is in bytes. `command` is what does it: a command line, or lines of
    Python in which the model is `model`.
    """

    name: str
    summary: str
    command: str
    dtype: str | None = None
    scaling: Scaling = UNCHANGED
    around: Around = _nothing
    instead: Altered | None = None
    reference: Around | None = None
    lossy: bool = False
    carried: bool = False
    extra: int = 0


Offer = Callable[[Situation], Iterable[Candidate | LeftOut]]
"""What fits a situation, ready to be tried; or why something that might seem to fit does not apply."""


def of_remedy(remedy: Remedy, command: str, tokens: int) -> Candidate:
    """A remedy of a repair's ranking."""
    return Candidate(
        name=remedy.name,
        summary=remedy.summary,
        command=command,
        dtype=remedy.dtype,
        scaling=remedy.scaling,
        around=remedy.around,
        lossy=remedy.lossy,
        carried=remedy.exportable,
        extra=remedy.extra(tokens),
    )
