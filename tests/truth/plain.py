"""A module that runs a few lines of code, and what is known of a fault in them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from truth.row import Expected, Origin, Planted, Row
from truth.score import finite

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
NAN, INF = float("nan"), float("inf")

Code = Callable[..., Any]


class Lines(nn.Module):
    """Runs `code(self, *arguments)`; parameters and buffers are its attributes."""

    def __init__(
        self,
        code: Code,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        modules: Callable[[], Mapping[str, nn.Module]],
    ) -> None:
        super().__init__()
        self.forward = functools.partial(code, self)  # with the names of its arguments
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.clone())
        torch.manual_seed(0)
        for name, module in modules().items():
            self.add_module(name, module.requires_grad_(False))


def lines(
    code: Code,
    *inputs: Any,
    expected: Expected | None,
    parameters: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    modules: Callable[[], Mapping[str, nn.Module]] = dict,
    dtype: torch.dtype = HALF,
    wide: bool | None = None,
    named: Mapping[str, Any] | None = None,
    symptom: Callable[[Any], None] | None = None,
) -> Planted:
    """`wide`: whether the same lines are finite in float64, which is run to see it."""

    def build(kind: torch.dtype) -> Lines:
        return Lines(code, parameters or {}, buffers or {}, modules).eval().to(kind)

    def run(kind: torch.dtype) -> Callable[[Any], Any]:
        given = [cast(one, kind) for one in inputs]
        by_name = {name: cast(one, kind) for name, one in (named or {}).items()}
        return lambda m: m(*given, **by_name)

    def shown(result: Any) -> None:
        if wide is not None:
            with torch.inference_mode():
                assert finite(run(torch.float64)(build(torch.float64))) == wide, f"float64 is not {wide=}"
        if symptom is not None:
            symptom(result)

    return Planted(model=build(dtype), run=run(dtype), expected=expected, symptom=shown)


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def broke(
    site: str | tuple[str, ...], operator: str | tuple[str, ...], kind: str | tuple[str, ...], **rest: Any
) -> Expected:
    """The columns that every row has; the outcome is that the damage reached what the caller gets."""
    return Expected(
        sites=site if isinstance(site, tuple) else (site,),
        operators=operator if isinstance(operator, tuple) else (operator,) if operator else (),
        kinds=kind if isinstance(kind, tuple) else (kind,),
        **{"outcome": "reached"} | rest,
    )


def source(kind: str | tuple[str, ...], name: str | tuple[str, ...] = (), finite: bool | None = None) -> Origin:
    return Origin(
        kinds=kind if isinstance(kind, tuple) else (kind,),
        names=name if isinstance(name, tuple) else (name,),
        finite=finite,
    )


def full(value: float, *shape: int) -> Tensor:
    return torch.full(shape or (1, 2, 4), value, dtype=torch.float64)


def counting(*shape: int) -> Tensor:
    """1, 2, 3, ..."""
    size = shape or (1, 2, 4)
    return torch.arange(1, 1 + torch.Size(size).numel(), dtype=torch.float64).reshape(size)


def rows(root: int, *table: tuple[str, Callable[[], Planted]], family: str = "plain") -> tuple[Row, ...]:
    return tuple(Row(name=name, root=root, family=family, make=make) for name, make in table)
