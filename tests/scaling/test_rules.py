"""Each operator alone: what its rule says of it is so, and asks for no more than it needs.

With any one rule made wrong, that would not hold of some operator.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from scaled.entry import scale
from scaled.operators import FREE, OPERATORS, STILL
from scaled.solved import drawn
from torch import Tensor, nn

from stabilitykit.models.operators import traits
from stabilitykit.scaling.call import Call
from stabilitykit.scaling.exponents import ZERO
from stabilitykit.scaling.rules import RULES, Rule
from stabilitykit.scaling.shadows import values
from stabilitykit.scaling.trace import Graph, trace


def built(name: str) -> nn.Module:
    return OPERATORS[name]().eval().requires_grad_(False)


def traced(model: nn.Module) -> Graph:
    return trace(copy.deepcopy(model).bfloat16(), lambda module: module())


def at(model: nn.Module, graph: Graph, seed: int) -> tuple[tuple[Tensor, ...], set[str]]:
    """What the model gives at a point that the equations leave, and which parameters have moved there."""
    scaling = drawn(graph, {}, seed)
    moved = copy.deepcopy(model)
    scale(moved, scaling)
    return moved(), {name for name, factor in scaling.parameters.items() if any(factor.exponents)}


def wrong(name: str) -> str:
    """What does not hold of this operator at points of the space that its equations leave, or nothing."""
    model = built(name)
    graph = traced(model)
    expected = model()
    movable = set()
    for seed in range(8):
        found, moved = at(model, graph, seed)
        movable |= moved
        if not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)):
            return "another result"
    operands = {one for one in graph.parameters if not one.startswith("made")}
    free = operands - STILL.get(name, set()) if name in FREE else set()
    return "" if movable & operands == free else "other operands can be scaled"


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_alone(name: str) -> None:
    assert not traced(built(name)).unknown_operators
    assert not wrong(name)


Change = Callable[[Rule, Call], tuple[Any, bool]]
"""Runs a rule and returns what is said instead, and whether that is anything else."""


def forgets(rule: Rule, call: Call) -> tuple[Any, bool]:
    """What the rule requires of its operands is not noted."""
    exponents: Any = call.exponents
    forgotten = []
    exponents.equate = lambda one, other, *why, **more: forgotten.append(one != other)
    try:
        return rule(call), any(forgotten)
    finally:
        del exponents.equate


def misplaces(rule: Rule, call: Call) -> tuple[Any, bool]:
    """Results are said to be larger by a factor that may be anything."""
    made = rule(call)
    factor = call.exponents.unknown("wrong", "parameter")
    if made is None:
        return None, False
    several = [call.sum(one, factor) for one in (made if isinstance(made, list) else [made])]
    return several if isinstance(made, list) else several[0], True


def pins(rule: Rule, call: Call) -> tuple[Any, bool]:
    """Results are said to keep their scale."""
    made = rule(call)
    if made is None:
        return None, False
    several = made if isinstance(made, list) else [made]
    return [ZERO] * len(several) if isinstance(made, list) else ZERO, any(values(one) != [ZERO] for one in several)


KINDS: dict[str, Rule] = {rule.__name__: rule for rule in RULES.values()}
HARMLESS = {("zeros", misplaces), ("clear", misplaces)}  # zeros have any scale


@pytest.fixture(scope="module")
def used() -> Mapping[str, list[str]]:
    """By the name of a rule, the operators of the table that come to it."""
    found: dict[str, list[str]] = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATORS:
            seen: set[str] = set()
            patch.setattr(
                "stabilitykit.scaling.trace.RULES",
                {one: _noting(rule, rule.__name__, seen) for one, rule in RULES.items()},
            )
            traced(built(name))
            for kind in seen:
                found[kind].append(name)
    return found


def _noting(rule: Rule, name: str, seen: set[str]) -> Rule:
    def now(call: Call) -> Any:
        seen.add(name)
        return rule(call)

    now.__module__ = rule.__module__
    return now


def _changed(rule: Rule, change: Change, differs: list[bool]) -> Rule:
    def now(call: Call) -> Any:
        made, is_another = change(rule, call)
        differs.append(is_another)
        return made

    now.__module__ = rule.__module__
    return now


@pytest.mark.table
@pytest.mark.parametrize("change", [forgets, misplaces, pins])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_rule_is_found_out(
    kind: str, change: Change, used: Mapping[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    differs: list[bool] = []
    now = _changed(KINDS[kind], change, differs)
    rules = {name: now if rule is KINDS[kind] else rule for name, rule in RULES.items()}
    monkeypatch.setattr("stabilitykit.scaling.trace.RULES", rules)
    assert used[kind]
    found = any(wrong(name) for name in used[kind])
    assert found == (any(differs) and (kind, change) not in HARMLESS)


# Of other devices, of 8-bit formats and of training; and composites of which torch also has an overload that is none.
ELSEWHERE = set(
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention "
    "_scaled_dot_product_fused_attention_overrideable _scaled_grouped_mm _scaled_mm cudnn_batch_norm "
    "mkldnn_convolution fake_quantize_per_tensor_affine_cachemask _native_batch_norm_legit_no_training "
    "_index_put_impl index_reduce lift adaptive_avg_pool1d avg_pool1d grouped_mm linear log_softmax norm "
    "repeat_interleave softmax".split()
)


def _is_composite(name: str) -> bool:
    """Whether it arrives as its parts."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, one) for one in packet.overloads()] if packet else []
    known = [traits(one) for one in overloads if torch._C._dispatch_has_kernel(one.name())]
    return bool(known) and all(one.composite for one in known)


def test_every_rule_is_tried() -> None:
    """Of operators that reach a trace."""
    seen: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        rules = {name: _noting(rule, name, seen) for name, rule in RULES.items()}
        patch.setattr("stabilitykit.scaling.trace.RULES", rules)
        for name in OPERATORS:
            traced(built(name))
    print([n for n in sorted(RULES.keys() - seen) if not _is_composite(n)])
    assert {name for name in RULES.keys() - seen if not _is_composite(name)} == ELSEWHERE
