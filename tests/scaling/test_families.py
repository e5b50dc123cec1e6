"""What the scale calculus makes of every family of the table."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from scaled.entry import Entry, outputs
from scaled.solved import drawn, solved
from scaled.table import ENTRIES
from torch import Tensor

from stabilitykit.scaling.apply import rounded
from stabilitykit.scaling.program import cheapest_to_give_up

EXACT = [entry for entry in ENTRIES.values() if not entry.obstacle]
EVERY = pytest.mark.parametrize("entry", ENTRIES.values(), ids=str)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def error(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference; NaN where there is one."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max())


@pytest.mark.table
@pytest.mark.parametrize("entry", EXACT, ids=str)
def test_a_family_is_repaired_exactly(entry: Entry) -> None:
    found = solved(entry.name)
    assert found.solution.is_exact
    assert not found.graph.unknown_operators
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
    scaling = drawn(found.graph, found.settings, seed)
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
    repaired: Any = entry.scaled(found.model, found.solution.scaling)
    repaired.save_pretrained(tmp_path)
    given = {"attn_implementation": entry.attentions[0], "dtype": torch.float32}
    again = type(repaired).from_pretrained(tmp_path, **given).eval()
    assert same(outputs(again, entry.run), outputs(found.model, entry.run))
    half = type(repaired).from_pretrained(tmp_path, **given | {"dtype": torch.float16}).eval()
    assert all(tensor.isfinite().all() for tensor in outputs(half, entry.run))


@pytest.mark.table
@pytest.mark.parametrize("entry", [one for one in ENTRIES.values() if one.obstacle], ids=str)
def test_what_has_no_exact_repair_is_told_why(entry: Entry) -> None:
    found = solved(entry.name)
    assert not found.solution.is_exact
    given_up = cheapest_to_give_up(found.graph, found.peaks, margin=entry.margin)
    said = " ".join(f"{one.site}: {one.why}." for one in given_up)
    for words in entry.obstacle:
        assert words in said
