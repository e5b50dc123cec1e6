"""What is passed to the model: arguments by name, and the tensors inside its caches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from stabilitykit.recorder.places.streams import named
from stabilitykit.recorder.tensors import floating
from stabilitykit.records import OriginKind

_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params", "past")
_DEEP = 4  # cache -> list of layers -> layer -> keys


def named_inputs(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[OriginKind, str, Tensor]]:
    """The floating tensors that a call is given: their kind, what the argument or the slot is called, the tensor."""
    for name, value in named(model, args, kwargs):
        if value is None or isinstance(value, bool | int | float | str):
            continue
        kind: OriginKind = "cache" if name in _CACHES else "input"
        if isinstance(value, Tensor | list | tuple | dict):
            for tensor in floating(value):
                yield kind, name, tensor
        else:
            for path, held in inside(value):
                for tensor in floating(held):
                    yield kind, path, tensor


def inside(value: Any, path: str = "", depth: int = _DEEP) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an object holds, by the attributes and indices that lead to them; not those of modules in it."""
    if isinstance(value, Tensor):
        yield path.removeprefix("."), value
    elif depth and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from inside(item, f"{path}.{index}", depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from inside(item, f"{path}.{key}", depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        for name, item in vars(value).items():
            yield from inside(item, f"{path}.{name}", depth - 1)
