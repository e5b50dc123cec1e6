"""The element of a weight, a buffer or an input that is no number, named, and another number in its place.

That cures nothing; it shows that this element alone is to blame.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.recorder.names import site_path
from stabilitykit.scaling.apply import tensors_by_name
from stabilitykit.trials.altered import Altered
from stabilitykit.trials.answers import answers
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import Situation
from stabilitykit.trials.stored import Held, held_by, wide_values
from stabilitykit.words import counted, number

WEIGHT = "weight replaced"
INPUT = "input replaced"


def replaced_weight(situation: Situation) -> Iterator[Candidate]:
    """Where a weight or a buffer is not finite."""
    if situation.kind != "weight":
        return
    found = lost_in(situation)
    if not found:
        return
    wide = wide_values(situation, found)
    if all(math.isfinite(one) for one in wide.values()):  # float32 has numbers there
        low = situation.reproduction.dtype
        largest = torch.finfo(getattr(torch, low)).max
        yield Candidate(
            name=WEIGHT,
            summary=f"Puts the largest number of {low}, {number(largest)}, in the place of {_named(found, wide)}.",
            command="\n".join(_lines(found, wide, largest)),
            around=partial(_with, {place: math.copysign(largest, wide[place]) for place in wide}),
            carried=True,
        )
        return
    zeros = {(one.name, index): 0.0 for one in found for index in one.indices}
    yield Candidate(
        name=WEIGHT,
        summary=f"Puts 0 in the place of {_named(found, {})}.",
        command="\n".join(_lines(found, {}, 0.0)),
        instead=Altered(situation.reproduction, partial(_with, zeros)),
    )


def lost_in(situation: Situation) -> list[Held]:
    """Tensors of the model with elements that are no numbers, the one to blame first.

    Infinities in a buffer may be meant so, as in a mask: only those of the buffer to blame count.
    """
    broke = situation.broke
    origin = None if broke is None or broke.broke is None else broke.broke.origin_name
    found = []
    for one in held_by(situation.model):
        if one.is_buffer and site_path(one.name) != origin and not one.has_nan:
            continue
        if one.indices:
            found.append(one)
    return sorted(found, key=lambda one: site_path(one.name) != origin)


def _named(found: list[Held], wide: Mapping[tuple[str, tuple[int, ...]], float]) -> str:
    """`layers.0.mlp.up_proj.weight[7, 9], which is NaN`, or how many there are, and the first."""
    first, amount = found[0], sum(one.lost for one in found)
    index, value = first.indices[0], first.values[0]
    known = wide.get((first.name, index))
    was = _value(value) if known is None else f"{number(known)} in float32 and {_value(value)} in {first.dtype}"
    place = f"{site_path(first.name)}{_at(index)}"
    return _counted(place, was, amount, site_path(first.name) if len(found) == 1 else f"{len(found):,} tensors")


def _counted(place: str, was: str, amount: int, whole: str) -> str:
    if amount == 1:
        return f"{place}, which is {was}"
    return f"{counted(amount, 'element')} of {whole} that are no numbers; the first, {place}, is {was}"


def _value(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinite" if value > 0 else "minus infinity"


def _at(index: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, index))}]" if index else ""


def _lines(found: list[Held], wide: Mapping[tuple[str, tuple[int, ...]], float], value: float) -> Iterator[str]:
    for one in found:
        get = "get_buffer" if one.is_buffer else "get_parameter"
        if one.lost == 1:
            index = one.indices[0]
            put = math.copysign(value, wide.get((one.name, index), 1.0)) if value else 0.0
            yield f"model.{get}({one.name!r}).data{_at(index)} = {put:g}"
        else:
            yield f"model.{get}({one.name!r}).data.nan_to_num_({value:g}, {value:g}, {-value:g})"


@contextmanager
def _with(values: Mapping[tuple[str, tuple[int, ...]], float], model: nn.Module) -> Iterator[None]:
    """These elements, and all others of the same tensors that are no numbers, replaced for the time of the block."""
    held = tensors_by_name(model)
    before: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name in dict.fromkeys(name for name, _ in values):
            tensor = held[name]
            before.append((tensor, tensor.detach().clone()))
            most = max(abs(value) for (own, _), value in values.items() if own == name)
            tensor.data.nan_to_num_(most and 0.0, most, -most)
            for (own, index), value in values.items():
                if own == name:
                    tensor.data[index] = value
    try:
        yield
    finally:
        for tensor, old in before:
            tensor.data.copy_(old)


def replaced_input(situation: Situation) -> Iterator[Candidate]:
    """Where what the model was given is not finite."""
    broke = situation.broke
    if broke is None or broke.broke is None or situation.kind != "input" or broke.broke.origin_kind == "cache":
        return
    seen = _Inputs()
    seen.look(situation)
    if not seen.found:
        return
    name, index, value = seen.found[0]
    yield Candidate(
        name=INPUT,
        summary=f"Puts 0 in the place of {_counted(f'{name}{_at(index)}', _value(value), seen.lost, name)}.",
        command=f"# {name}.nan_to_num(0.0, 0.0, 0.0), and look at what makes it",
        instead=Altered(situation.reproduction, _numbers),
    )


@contextmanager
def _numbers(model: nn.Module) -> Iterator[None]:
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            tuple(_number(str(place), one) for place, one in enumerate(args)),
            {name: _number(name, one) for name, one in kwargs.items()},
        ),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        handle.remove()


def _number(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _number(f"{name}[{key!r}]", one) for key, one in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_number(f"{name}[{place}]", one) for place, one in enumerate(value))
    return value.nan_to_num(0.0, 0.0, 0.0) if is_lost(name, value) else value


def is_lost(name: str, value: Any) -> bool:
    """Whether an argument holds what is no number, other than -inf in a mask."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.element_size() == 1:
        return False
    if "mask" in name or bool((value == -torch.inf).any()):
        return bool((value.isnan() | (value == torch.inf)).any())
    return not bool(value.isfinite().all())


class _Inputs:
    """The elements that are no numbers in what a model is given: name, index, value."""

    def __init__(self) -> None:
        self.found: list[tuple[str, tuple[int, ...], float]] = []  # the first of each tensor
        self.lost = 0

    def look(self, situation: Situation) -> None:
        answers(situation.reproduction, situation.model, around=self._looking(situation.model))

    @contextmanager
    def _looking(self, model: nn.Module) -> Iterator[None]:
        names = list(inspect.signature(model.forward).parameters)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
                self._see(name, value)

        handle = model.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                self._see(f"{name}[{key!r}]", one)
        elif isinstance(value, list | tuple):
            for place, one in enumerate(value):
                self._see(f"{name}[{place}]", one)
        elif is_lost(name, value):
            places = (~value.isfinite()).nonzero()
            self.lost += len(places)
            first = tuple(places[0].tolist())
            self.found.append((name, first, float(value[first])))
