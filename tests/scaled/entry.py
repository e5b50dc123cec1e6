"""An entry of the table: a model that float16 breaks, how it is built, what runs it, and whether it can be repaired."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.records.scaling import Scaling
from stabilitykit.scaling.apply import scaled, with_settings
from stabilitykit.scaling.blueprint import Blueprint

Run = Callable[[nn.Module], tuple[Tensor, ...]]
"""Runs a model and returns what has to stay as it is, whatever the model is scaled by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """`settings()` is a new nested config; `construct(settings, attention)` the library's model of one, on any device.

    `plant(model)` makes the filled model overflow. `attentions`: the implementations that the family has, the first is
    the one to trace. `margin`: the bits of headroom that a repair reaches. `obstacle`: empty where an exact repair
    exists, otherwise words that the explanation of its absence has to hold, in any order.
    """

    name: str
    settings: Callable[[], dict[str, Any]]
    construct: Callable[[Mapping[str, Any], str], nn.Module]
    plant: Callable[[nn.Module, Run], None]
    run: Run
    unseen: Mapping[str, Run] = field(default_factory=dict)
    attentions: tuple[str, ...] = ("eager", "sdpa")
    margin: float = 2.0
    obstacle: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def build(self, settings: Mapping[str, Any] | None = None, attention: str | None = None) -> nn.Module:
        """A model in float32 of these settings, by default the entry's own, with whatever weights the library gives."""
        made = copy.deepcopy(dict(self.settings() if settings is None else settings))
        return self.construct(made, attention or self.attentions[0]).eval().requires_grad_(False)

    def model(self) -> nn.Module:
        """The entry's model, filled and planted: the same weights each time, all of which bfloat16 holds."""
        torch.manual_seed(0)
        model = self.build()
        fill(model)
        self.plant(model, self.run)
        return model

    def blueprint(self) -> Blueprint:
        return Blueprint(settings=self.settings(), build=self.build)

    def same(
        self, model: nn.Module, settings: Mapping[str, Any] | None = None, attention: str | None = None
    ) -> nn.Module:
        """A model of other settings or another attention with `model`'s parameters and buffers."""
        made = self.build(settings, attention)
        made.load_state_dict(model.state_dict())
        return made

    def scaled(self, model: nn.Module, scaling: Scaling, attention: str | None = None) -> nn.Module:
        """A model of the scaled settings with `model`'s parameters, scaled."""
        made = self.same(model, with_settings(self.settings(), scaling.settings), attention)
        scale(made, scaling)
        return made


def scale(model: nn.Module, scaling: Scaling) -> None:
    """Scales the model's parameters and buffers, in place."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, factor in scaling.parameters.items():
        tensors[name].copy_(scaled(tensors[name], factor))


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random weights that keep activations near 1 in every layer, each of them a number of bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.1 * drawn)
        elif parameter.ndim < 2 or name.endswith("A_log"):  # gains, and what is learned of a state's decay
            parameter.add_((25 * drawn).round() / 256)  # few bits, so that c + w can be scaled without rounding
        elif id(parameter) in embeddings:
            parameter.copy_(drawn)
        else:
            fan = parameter[0].numel() if parameter.ndim > 3 else parameter.shape[-1]
            parameter.copy_(drawn / fan**0.5)
        parameter.copy_(parameter.bfloat16())
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """Part of a parameter, doubled until the module `at` gives, or reads if `read`, something no smaller than `size`.

    `louder` are other parameters that are doubled with it, so that no weight leaves float16's range: what is planted
    is less than four times `size`, without them less than two. `added` is c of a gain c + w.
    """

    parameter: str
    at: str
    part: tuple[slice, ...] = (slice(1, 4),)
    louder: tuple[str, ...] = ()
    read: bool = False
    added: float = 0.0
    size: float = 70_000.0

    def __call__(self, model: nn.Module, run: Run) -> None:
        planted = model.get_parameter(self.parameter)[self.part]
        whole = [model.get_parameter(name) for name in self.louder]
        while _peak(model, run, self.at, self.read) < self.size:
            planted.copy_((2 * (planted + self.added) - self.added).bfloat16())
            for parameter in whole:
                parameter.mul_(2)


def planted(*plants: Plant) -> Callable[[nn.Module, Run], None]:
    def plant(model: nn.Module, run: Run) -> None:
        for one in plants:
            one(model, run)

    return plant


def _peak(model: nn.Module, run: Run, at: str, read: bool) -> float:
    """The largest magnitude of what the module `at` gives, or else reads, while `model` is run."""
    found = [0.0]

    def note(_: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        for tensor in arguments if read else result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                found.append(float(tensor.abs().max()))

    hook = model.get_submodule(at).register_forward_hook(note)
    try:
        with torch.no_grad():
            run(model)
    finally:
        hook.remove()
    return max(found)


def outputs(model: nn.Module, *runs: Run) -> list[Tensor]:
    """What the runs return, one after the other, in float32."""
    with torch.no_grad():
        return [tensor.float() for run in runs for tensor in run(model)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether all bits agree."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def error(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference; NaN where there is one."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max())
