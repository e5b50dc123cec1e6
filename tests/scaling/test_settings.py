"""Numbers of a model that follow settings of its config: found, given a scale, or held where a rule knows none."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scaled.entry import scale
from scaled.runs import noise
from scaled.solved import drawn
from torch import Tensor, nn

from stabilitykit.scaling.apply import with_settings
from stabilitykit.scaling.blueprint import Blueprint
from stabilitykit.scaling.trace import Graph, trace

SETTINGS = {"eps": 1e-3, "slope": 0.375, "other_eps": 1e-3, "text": {"scale": 0.125, "square": 1024.0}}


class Norm(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Small(nn.Module):
    """A projection, a norm, and `then`, which may use the module's numbers."""

    def __init__(self, settings: Mapping[str, Any], then: Callable[["Small", Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(8, 8, seed=1))
        self.last = nn.Parameter(torch.tensor(0.75))
        self.norm = Norm(settings["eps"])
        self.own_eps = settings["eps"]
        self.slope = settings["slope"]
        self.scale = settings["text"]["scale"]
        self.root = settings["text"]["square"] ** -0.5
        self.then = then

    def forward(self) -> tuple[Tensor, Tensor]:
        inner = noise(2, 3, 8).to(self.weight.dtype) @ self.weight
        return self.norm(inner), self.last * self.then(self, inner)


class Twice(Small):
    """Two of its numbers are equal, and follow different settings."""

    def __init__(self, settings: Mapping[str, Any], then: Callable[["Small", Tensor], Tensor]) -> None:
        super().__init__(settings, then)
        self.other_eps = settings["other_eps"]
        self.other = Norm(settings["other_eps"])


def points(then: Callable[[Any, Tensor], Tensor], kind: type[Small] = Small) -> tuple[Graph, set[str]]:
    """The trace of one, which is held against the model at points that it leaves; and the settings that moved there."""

    def build(settings: Mapping[str, Any]) -> Small:
        return kind(settings, then).eval().requires_grad_(False)

    model = build(SETTINGS)
    graph = trace(copy.deepcopy(model).bfloat16(), lambda module: module(), Blueprint(settings=SETTINGS, build=build))
    moved: set[str] = set()
    for seed in range(6):
        scaling = drawn(graph, SETTINGS, seed)
        other = build(with_settings(SETTINGS, scaling.settings))
        scale(other, scaling)
        for one, expected in zip(other(), model(), strict=True):
            assert torch.equal(one, expected)
        moved |= {key for key, exponent in scaling.settings.items() if exponent}
    return graph, moved


def test_an_eps_moves_with_what_it_is_added_to() -> None:
    assert points(lambda module, x: x)[1] == {"eps"}


@pytest.mark.parametrize(
    "then",
    [
        lambda module, x: F.leaky_relu(x, module.own_eps),
        lambda module, x: torch.add(x, x, alpha=module.own_eps),
        lambda module, x: x + torch.full((8,), module.own_eps, dtype=x.dtype),
        lambda module, x: x.tanh() + module.own_eps,
        lambda module, x: x.tanh() * module.own_eps,
        lambda module, x: torch.where(x.tanh() > module.own_eps, 1.0, 0.0).to(x.dtype),
        lambda module, x: x.sigmoid().clamp(min=module.own_eps),
    ],
    ids=["slope", "alpha", "fill", "sum", "product", "comparison", "bound"],
)
def test_a_setting_is_not_moved_where_it_has_another_use(then: Callable[[Any, Tensor], Tensor]) -> None:
    assert "eps" not in points(then)[1]


def test_a_scale_moves_against_what_it_multiplies() -> None:
    assert points(lambda module, x: (x * module.scale).softmax(-1))[1] == {"eps", "text.scale"}
    assert points(lambda module, x: (x * module.root).softmax(-1))[1] == {"eps", "text.square"}
    assert points(lambda module, x: (x / module.slope).tanh())[1] == {"eps", "slope"}


def test_a_number_that_may_be_either_of_two_settings_holds_both() -> None:
    assert points(lambda module, x: (module.other(x), x + module.own_eps)[1], Twice)[1] == set()
