"""Calls of a model on the same rows in other company: alone, repeated, or padded on the other side."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from stabilitykit.trials.attributes import attribute

Call = Callable[..., Any]
_CACHES = ("past", "cache")


@contextmanager
def calls(change: Callable[[Call], Call], model: nn.Module) -> Iterator[None]:
    """Replaces what a caller of the model calls: `generate`, and `forward` where it is given no cache."""
    with ExitStack() as stack:
        inside: list[bool] = []
        for name in ("generate", "forward"):
            call = getattr(model, name, None)
            if call is not None:
                stack.enter_context(attribute(model, name, _outermost(call, change(call), inside)))
        yield


def _outermost(plain: Call, changed: Call, inside: list[bool]) -> Call:
    @wraps(plain)  # generate looks at what forward takes
    def call(*args: Any, **kwargs: Any) -> Any:
        if inside or _has_cache(kwargs) or rows_of(args, kwargs) is None:
            return plain(*args, **kwargs)
        inside.append(True)
        try:
            return changed(*args, **kwargs)
        finally:
            inside.pop()

    return call


def _has_cache(kwargs: Mapping[str, Any]) -> bool:
    named = [value for name, value in kwargs.items() if any(part in name for part in _CACHES)]
    return any(value is not None and not isinstance(value, bool) for value in named)


def rows_of(args: Any, kwargs: Any) -> int | None:
    """How many rows a call has: the first size of its tensors, where those of two or more dimensions agree."""
    sizes = {one.shape[0] for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.ndim > 1}
    return sizes.pop() if len(sizes) == 1 else None


def apart(size: int, call: Call) -> Call:
    """At most `size` rows at a time."""

    def split(*args: Any, **kwargs: Any) -> Any:
        rows = rows_of(args, kwargs)
        assert rows is not None
        kwargs = {**kwargs, **({"use_cache": False} if kwargs.get("use_cache") is not False and _takes(call) else {})}
        parts = []
        for start in range(0, rows, size):
            given = partial(_rows, rows, slice(start, start + size))
            own_args, own_kwargs = tree_map_only(Tensor, given, (args, kwargs))
            parts.append(call(*own_args, **own_kwargs))
        return joined(parts)

    return split


def repeated(times: int, call: Call) -> Call:
    """Every row so many times, of which the first are returned."""

    def more(*args: Any, **kwargs: Any) -> Any:
        rows = rows_of(args, kwargs)
        assert rows is not None
        again = partial(_repeated, rows, times)
        many_args, many_kwargs = tree_map_only(Tensor, again, (args, kwargs))
        output = call(*many_args, **many_kwargs)
        return tree_map_only(Tensor, partial(_rows, rows * times, slice(0, rows)), output)

    return more


def _takes(call: Call) -> bool:
    return "use_cache" in inspect.signature(call).parameters


def _rows(rows: int, part: slice, tensor: Tensor) -> Tensor:
    return tensor[part] if tensor.ndim and tensor.shape[0] == rows else tensor


def _repeated(rows: int, times: int, tensor: Tensor) -> Tensor:
    if not tensor.ndim or tensor.shape[0] != rows:
        return tensor
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))


def _in_turn(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts[0].ndim else parts[0]


def joined(parts: Sequence[Any], together: Callable[[Sequence[Tensor]], Tensor] = _in_turn) -> Any:
    """Outputs of some rows each, as one of them all, whose tensors are those of the parts `together`.

    Caches are left out; of what else is no tensor it has the first one's.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return together(parts)
    if isinstance(first, Mapping):
        held = {name: joined([part[name] for part in parts], together) for name in first}
        return type(first)(**held) if hasattr(first, "to_tuple") else held
    if isinstance(first, list | tuple):
        made = [joined(ones, together) for ones in zip(*parts, strict=True)]
        return type(first)(*made) if hasattr(first, "_fields") else type(first)(made)
    return None if hasattr(first, "get_seq_length") else first


def other_side(call: Call) -> Call:
    """Padding moved to the other end of each row, every token with the position that it had."""

    def moved(*args: Any, **kwargs: Any) -> Any:
        kept = real(args, kwargs)
        if kept is None or kwargs.get("labels") is not None:
            return call(*args, **kwargs)
        shape, length = kept.shape, kept.shape[1]
        left = not bool(kept[:, 0].all())
        order = torch.argsort((kept if left else ~kept).long(), dim=-1, descending=True, stable=True)
        back = torch.argsort(order, dim=-1)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=kept.device).expand(shape)
        plain = call(*args, **kwargs)

        def sorted_by(places: Tensor, tensor: Tensor) -> Tensor:
            if tensor.shape[:2] != shape:
                return tensor
            return tensor.gather(1, places.reshape(*shape, *[1] * (tensor.ndim - 2)).expand_as(tensor))

        own = {**kwargs, "position_ids": positions.expand(shape)}
        own_args, own_kwargs = tree_map_only(Tensor, partial(sorted_by, order), (args, own))
        output = call(*own_args, **own_kwargs)

        def of_tokens(now: Any, before: Any) -> Any:
            if not isinstance(now, Tensor) or now.shape[:2] != shape:
                return before
            return torch.where(kept.reshape(*shape, *[1] * (now.ndim - 2)), sorted_by(back, now), before)

        if isinstance(output, Tensor):
            return of_tokens(output, plain)
        if isinstance(output, Mapping):
            held = {name: of_tokens(value, plain.get(name)) for name, value in output.items()}
            return type(output)(**held) if hasattr(output, "to_tuple") else held
        return plain

    return moved


def real(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens [B, L] of a call are no padding; None where none of them is."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.bool()
