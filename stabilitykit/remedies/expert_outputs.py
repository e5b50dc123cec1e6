"""A power of two of the routing weights, taken into the experts that they weigh.

A mixture stores what each expert returns before it is multiplied by its routing weight, which is at most 1. With every
expert's last projection times 2^-k and routing weights times 2^k, the sum is what it was, bit for bit.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from stabilitykit.formats import FLOAT16
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.remedies.places import overflowing_in
from stabilitykit.remedies.remedy import LeftOut, Remedy
from stabilitykit.remedies.seen import Seen
from stabilitykit.words import counted

_NAME = "routing weights in experts"
_WEIGHTS = "top_k_weights"  # what an experts module of transformers is given beside hidden states and the index
_LAST = ("down_proj", "down_proj_bias")


def expert_outputs(seen: Seen) -> Remedy | LeftOut:
    """For mixtures of which an expert's output overflows before it is weighed."""
    found = [module for module in overflowing_in(seen) if _is_weighed(module)]
    if not found:
        return LeftOut(_NAME, "No expert's output overflows before its routing weight is applied.")
    paths = [path for path, module in seen.model.named_modules() if any(module is one for one in found)]
    largest = max(one.amax or 0.0 for one in seen.overflowing.values())
    exponent = max(1, math.ceil(1 - FLOAT16.headroom(largest)))

    @contextmanager
    def around(model: nn.Module) -> Iterator[None]:
        def enlarge(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            given = inspect.signature(module.forward).bind(*args, **kwargs)
            given.arguments[_WEIGHTS] = given.arguments[_WEIGHTS] * 2.0**exponent
            return given.args, given.kwargs

        modules = dict(model.named_modules())
        with ExitStack() as stack:
            for path in paths:
                stack.callback(modules[path].register_forward_pre_hook(enlarge, with_kwargs=True).remove)
            yield

    scaled = [
        f"{path}.{name}" for path in paths for name, _ in seen.model.get_submodule(path).named_parameters(recurse=False)
        if name in _LAST
    ]  # fmt: skip
    return Remedy(
        name=_NAME,
        summary=f"Multiplies experts' last projections by 2^-{exponent} and their routing weights by 2^{exponent}, in "
        f"{counted(len(paths), 'layer')} where they overflow: the same function, to the last bit in float32.",
        scaling=Scaling(parameters=dict.fromkeys(scaled, Factor(exponents=(-exponent,)))),
        around=around,
        exportable=False,
    )


def _is_weighed(module: nn.Module) -> bool:
    return _WEIGHTS in inspect.signature(module.forward).parameters and isinstance(
        getattr(module, "down_proj", None), nn.Parameter
    )
