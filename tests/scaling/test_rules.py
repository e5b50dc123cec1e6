"""Each operator alone: what its rule says of it is so, and asks for no more than it needs."""

import copy

import pytest
import torch
from scaled.entry import scale
from scaled.operators import FREE, OPERATORS
from scaled.solved import drawn
from torch import Tensor, nn

from stabilitykit.scaling.trace import Graph, trace


def built(name: str) -> nn.Module:
    return OPERATORS[name]().eval().requires_grad_(False)


def traced(model: nn.Module) -> Graph:
    return trace(copy.deepcopy(model).bfloat16(), lambda module: module())


def at(model: nn.Module, graph: Graph, seed: int) -> tuple[tuple[Tensor, ...], set[str]]:
    """What the model gives at a point that the equations leave, and which operands of the operator have moved there."""
    scaling = drawn(graph, {}, seed)
    moved = copy.deepcopy(model)
    scale(moved, scaling)
    return moved(), {name for name, factor in scaling.parameters.items() if any(factor.exponents)}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_alone(name: str) -> None:
    model = built(name)
    graph = traced(model)
    assert not graph.unknown_operators
    expected = model()
    points = [at(model, graph, seed) for seed in range(6)]
    for found, _ in points:
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    operands = {one for one in graph.parameters if not one.startswith("made")}
    assert operands & set().union(*(moved for _, moved in points)) == (operands if name in FREE else set())
