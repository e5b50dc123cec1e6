"""What an option can be: each choice is named once, for the functions and the command line, without torch."""

from collections.abc import Iterable
from typing import Literal

from stabilitykit.errors import MisuseError

RoundingName = Literal["transformers", "gemma_pytorch"]
"""Whose rounding points the kit's own model reproduces."""

Attention = Literal["eager", "sdpa"]
"""Which attention a model of transformers' runs."""

WideDtype = Literal["float32", "bfloat16", "float64"]
"""The dtype of a run that holds what other formats may not."""

LowDtype = Literal["float16", "bfloat16"]
"""The dtype in which a search looks for overflows."""

BoundDtype = Literal["float16", "bfloat16", "float32"]
"""The dtype whose stored results are bounded."""

ExportDtype = Literal["float16", "float32"]
"""The dtype in which a folder's weights are written."""

Level = Literal["layers", "modules", "operators"]
"""What is recorded: every operator and module, modules only, or layers only."""


def check_choice(what: str, value: str, allowed: Iterable[str]) -> None:
    """Raises MisuseError, listing what is allowed, for a `value` that is not."""
    known = list(allowed)
    if value not in known:
        raise MisuseError(f"Unknown {what} {value!r}; choose one of: {', '.join(known)}.")
