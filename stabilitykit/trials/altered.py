"""The same failure with something changed in which no dtype has a part: an argument, a setting, a label."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from stabilitykit.remedies.remedy import Around
from stabilitykit.trials.reproduction import Reproduction


@dataclass(frozen=True, slots=True)
class Altered:
    """`of`, run inside `around`, in any dtype. A candidate that is tried so is compared with its own float32 run, for
    without the change float32 fails too, or gives something else.
    """

    of: Reproduction
    around: Around

    @property
    def dtype(self) -> str:
        return self.of.dtype

    @property
    def source(self) -> str | None:
        return self.of.source

    @property
    def matmul(self) -> str | None:
        return self.of.matmul

    @property
    def grad(self) -> bool:
        return self.of.grad

    @property
    def notes(self) -> tuple[str, ...]:
        return self.of.notes

    @property
    def text(self) -> Callable[[int], str] | None:
        return self.of.text

    def in_dtype(self, dtype: str) -> str:
        return self.of.in_dtype(dtype)

    def model(self, dtype: str) -> nn.Module:
        return self.of.model(dtype)

    def run(self, model: nn.Module) -> Any:
        with self.around(model):
            return self.of.run(model)
