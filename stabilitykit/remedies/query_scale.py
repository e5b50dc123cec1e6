"""The power of two in an attention's scale, taken from the scores to the queries that they are made of.

Attention often stores q · k before it is multiplied by a scale such as 1 / sqrt(64) = 2^-3. With queries times 2^-3,
and a scale of 1, every score is what it was, bit for bit, and what is stored on the way is no larger than that.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stabilitykit.diagnosis.projections import NORMS, PROJECTIONS
from stabilitykit.remedies.places import overflowing_in, scale_of
from stabilitykit.remedies.remedy import LeftOut, Remedy
from stabilitykit.remedies.seen import Seen
from stabilitykit.words import counted

_NAME = "scale on queries"
_QUERIES = (*NORMS["query"], *PROJECTIONS["query"])


@dataclass(frozen=True, slots=True)
class _Attention:
    module: nn.Module
    scale: str  # the attribute's name
    queries: nn.Module


def query_scale(seen: Seen) -> Remedy | LeftOut:
    """For models of which a product of queries and keys overflows before it is scaled."""
    found = [one for module in overflowing_in(seen, "matmul") if (one := _attention(module)) is not None]
    if not found:
        return LeftOut(_NAME, "No attention stores scores that overflow before a scale of its own is applied.")
    exponents = sorted({_exponent(one) for one in found})

    @contextmanager
    def around(model: nn.Module) -> Iterator[None]:
        paths = dict(model.named_modules())
        own = dict(seen.model.named_modules())
        with ExitStack() as stack:
            for path in [path for path, module in own.items() if any(module is one.module for one in found)]:
                attention = _attention(paths[path])
                assert attention is not None
                stack.enter_context(_folded(attention))
            yield

    powers = " or ".join(f"2^-{exponent}" for exponent in exponents)
    return Remedy(
        name=_NAME,
        summary=f"Multiplies queries, not scores, by the {powers} in the scale of attention, in "
        f"{counted(len(found), 'layer')} whose scores overflow before it: the same function, to the last bit in "
        "float32.",
        around=around,
        exportable=False,
    )


@contextmanager
def _folded(attention: _Attention) -> Iterator[None]:
    exponent, scale = _exponent(attention), getattr(attention.module, attention.scale)

    def shrink(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 2.0**-exponent

    handle = attention.queries.register_forward_hook(shrink)
    setattr(attention.module, attention.scale, scale * 2.0**exponent)
    try:
        yield
    finally:
        setattr(attention.module, attention.scale, scale)
        handle.remove()


def _attention(module: nn.Module) -> _Attention | None:
    scale = scale_of(module)
    if scale is None or not 0 < getattr(module, scale) <= 0.5:
        return None
    queries = next((one for name in _QUERIES if isinstance(one := getattr(module, name, None), nn.Module)), None)
    return None if queries is None else _Attention(module, scale, queries)


def _exponent(attention: _Attention) -> int:
    return math.floor(-math.log2(getattr(attention.module, attention.scale)))
