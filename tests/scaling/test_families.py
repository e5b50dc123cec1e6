"""What the scale calculus makes of every family of the table."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from scaled.entry import Entry, error, outputs, same
from scaled.solved import drawn, solved
from scaled.table import ENTRIES

from stabilitykit.scaling.apply import rounded
from stabilitykit.scaling.explain import obstacles

EXACT = [entry for entry in ENTRIES.values() if not entry.obstacle]
EVERY = pytest.mark.parametrize("entry", ENTRIES.values(), ids=str)


@pytest.mark.table
@pytest.mark.parametrize("entry", EXACT, ids=str)
def test_a_family_is_repaired_exactly(entry: Entry) -> None:
    found = solved(entry.name)
    assert found.solution.is_exact
    assert not found.traced.graph.unknown_operators
    for name, factor in found.solution.scaling.parameters.items():
        assert not rounded(found.model.state_dict()[name], factor), name
    for attention in entry.attentions:
        plain = entry.same(found.model, attention=attention)
        repaired = entry.scaled(found.model, found.solution.scaling, attention)
        for what, run in {"traced": entry.run, **entry.unseen}.items():
            assert same(outputs(repaired, run), outputs(plain, run)), (what, attention)
    expected = outputs(found.model, entry.run)
    repaired = entry.scaled(found.model, found.solution.scaling)
    half = error(outputs(repaired.half(), entry.run), expected)
    assert half < error(outputs(copy.deepcopy(found.model).bfloat16(), entry.run), expected)


@pytest.mark.table
@EVERY
@pytest.mark.parametrize("seed", range(4))
def test_every_solution_of_the_equations_keeps_the_function(entry: Entry, seed: int) -> None:
    found = solved(entry.name)
    scaling = drawn(found.traced.graph, found.traced.settings, seed)
    assert any(any(factor.exponents) for factor in scaling.parameters.values())
    for attention in entry.attentions:
        plain = entry.same(found.model, attention=attention)
        moved = entry.scaled(found.model, scaling, attention)
        for what, run in {"traced": entry.run, **entry.unseen}.items():
            assert same(outputs(moved, run), outputs(plain, run)), (what, attention)


@pytest.mark.table
@pytest.mark.parametrize("entry", EXACT, ids=str)
def test_a_repaired_family_is_read_by_its_library_alone(entry: Entry, tmp_path: Path) -> None:
    found = solved(entry.name)
    read = {}
    for name, model in ("plain", found.model), ("repaired", entry.scaled(found.model, found.solution.scaling)):
        cast(Any, model).save_pretrained(tmp_path / name)
        for dtype in torch.float32, torch.float16:
            # results depend on where a file's header lets weights begin, and on whether they require gradients
            read[name, dtype] = type(cast(Any, model)).from_pretrained(
                tmp_path / name, dtype=dtype, attn_implementation=entry.attentions[0]
            )
    plain, repaired = (outputs(read[name, torch.float32].eval(), entry.run) for name in ("plain", "repaired"))
    assert same(repaired, plain)
    assert error(plain, outputs(found.model, entry.run)) < 1e-4
    assert all(tensor.isfinite().all() for tensor in outputs(read["repaired", torch.float16].eval(), entry.run))


@pytest.mark.table
@pytest.mark.parametrize("entry", [one for one in ENTRIES.values() if one.obstacle], ids=str)
def test_what_has_no_exact_repair_is_told_why(entry: Entry) -> None:
    found = solved(entry.name)
    assert not found.solution.is_exact
    said = " ".join(obstacles(found.traced, found.solution, entry.margin))
    for words in entry.obstacle:
        assert words in said


@pytest.mark.table
@pytest.mark.parametrize("entry", [one for one in ENTRIES.values() if one.obstacle], ids=str)
def test_where_only_an_eps_or_a_small_bound_is_in_the_way_an_approximate_repair_serves(entry: Entry) -> None:
    found = solved(entry.name)
    soft = found.traced.solve(margin=entry.margin, soft=True)
    if entry.name in ("Whisper", "scores before a constant"):
        assert soft.short
        return
    assert soft.given_up
    assert not soft.short
    near = entry.scaled(found.model, soft.scaling)
    expected = outputs(found.model, entry.run)
    coarse = error(outputs(copy.deepcopy(found.model).bfloat16(), entry.run), expected)
    assert error(outputs(near, entry.run), expected) < coarse / 8
    assert error(outputs(near.half(), entry.run), expected) < coarse
