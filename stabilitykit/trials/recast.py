"""The same code in another dtype, also where the code itself asks for a narrow one."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from stabilitykit.models.operators import OperatorMode, Traits

NARROW = (torch.float16, torch.bfloat16)
_FLOAT8 = tuple(one for name, one in vars(torch).items() if name.startswith("float8_") and isinstance(one, torch.dtype))
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


class Recast(OperatorMode):  # type: ignore[no-untyped-call]
    """Inside the block, operators that are given tensors of a narrow dtype, or asked for one, work in `target` instead.

    Narrow is `source`, or all that have fewer bits than `target` where it is None, float8 among them. What is written
    into a narrow tensor that was there before is rounded to it. Autocasting to a narrow dtype is to `target` from its
    first cast on, if that has 16 bits. `changed` counts the operators that were. `rounds`: what was to be cast to 8
    bits has their precision, though not their range.
    """

    def __init__(self, target: torch.dtype, source: torch.dtype | None = None, *, rounds: bool = False) -> None:
        super().__init__(self._run, given=self._given)
        self.changed = 0
        self._rounds = rounds
        self._target = target
        fewer = (*NARROW, *_FLOAT8, *((torch.float32,) if target == torch.float64 else ()))
        self._narrow = (source,) if source is not None else fewer
        self._autocast: dict[str, torch.dtype] = {}  # by device, what autocasting was to before the block

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        for device, dtype in self._autocast.items():
            torch.set_autocast_dtype(device, dtype)
        self._autocast.clear()

    def _given(self, kind: Traits, args: Any, kwargs: dict[str, Any]) -> Any:
        if kind.writes_in_place:
            return args, kwargs
        changed = False
        asked = (
            next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.dtype) and one in _FLOAT8), None)
            if self._rounds
            else None
        )
        if asked is not None and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            args = (_rounded(args[0], asked), *args[1:])

        def cast(leaf: Any) -> Any:
            nonlocal changed
            if isinstance(leaf, Tensor) and leaf.dtype in self._narrow:
                changed = True
                return leaf.to(self._target)
            if isinstance(leaf, torch.dtype) and leaf in self._narrow:
                changed = True
                if args and isinstance(args[0], Tensor):
                    self._autocast_to(args[0].device.type)
                return self._target
            return leaf

        args, kwargs = tree_map(cast, (args, kwargs))
        self.changed += changed
        return args, kwargs

    def _autocast_to(self, device: str) -> None:
        """Else operators that take no operands of two dtypes would be given what is autocast and what is not."""
        if self._target not in NARROW or device not in _AUTOCAST:
            return
        own = torch.get_autocast_dtype(device)
        if own in self._narrow:
            self._autocast.setdefault(device, own)
            torch.set_autocast_dtype(device, self._target)

    def _run(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kind.writes_in_place:
            args, kwargs = self._given(kind, args, kwargs)
            return kind.func(*args, **kwargs)
        places = {place for place, _ in kind.written}
        written = (args[place] if place < len(args) else kwargs.get(name) for place, name in kind.written)
        into = next((one for one in written if isinstance(one, Tensor)), None)
        if into is None or not into.is_floating_point():
            return kind.func(*args, **kwargs)

        def fit(leaf: Any) -> Any:
            differs = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != into.dtype
            return leaf.to(into.dtype) if differs else leaf

        fitted = [arg if place in places else tree_map(fit, arg) for place, arg in enumerate(args)]
        return kind.func(*fitted, **kwargs)


class Precision(OperatorMode):  # type: ignore[no-untyped-call]
    """Inside the block, what operators make in float32 has the precision of `dtype`, and keeps float32's range.

    It is rounded by `way`: torch.round, torch.floor or torch.ceil.
    """

    def __init__(self, dtype: torch.dtype, way: Callable[[Tensor], Tensor] = torch.round) -> None:
        super().__init__(self._run)
        self._dtype = dtype
        self._way = way

    def _run(self, kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = kind.func(*args, **kwargs)
        if kind.writes_in_place:
            return output
        return tree_map_only(Tensor, self._narrow, output)

    def _narrow(self, tensor: Tensor) -> Tensor:
        return _rounded(tensor, self._dtype, self._way) if tensor.dtype == torch.float32 else tensor


def _rounded(tensor: Tensor, dtype: torch.dtype, way: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """`tensor` with as many significant bits as `dtype` has."""
    bits = 1 - math.log2(torch.finfo(dtype).eps)
    part, exponent = torch.frexp(tensor.float())
    made = torch.ldexp(way(part * 2.0**bits) * 2.0**-bits, exponent)
    return torch.where(tensor.isfinite(), made, tensor).to(tensor.dtype)
