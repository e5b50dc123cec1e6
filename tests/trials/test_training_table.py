"""Of every training step that fails, what cures it by hand was tried and shown to, and nothing else was."""

import math
import re
import warnings

import pytest
import torch
from trials.steps import CASES, Case, Hand, by_hand

from stabilitykit.trials.training import diagnose_training

HALF = torch.float16


def cures(case: Case) -> dict[str, bool]:
    """By name of the change, whether it cures the step, done by hand in plain torch."""
    scale = case.loss_scale
    wide = by_hand(case, torch.float32, scale)
    plain = by_hand(case, HALF, scale)
    found = {
        "float32": wide.near(wide),
        "bfloat16": by_hand(case, torch.bfloat16, scale).near(wide),
        "master weights": by_hand(case, HALF, scale, autocast=True).near(wide),
    }
    below = math.ceil(math.log2(scale)) - 1
    if not plain.finite:
        powers = (k for k in range(below, -25, -1) if by_hand(case, HALF, 2.0**k).finite)
        power = next(powers, None)
        found["smaller loss scale"] = power is not None and by_hand(case, HALF, 2.0**power).near(wide)
    elif not plain.alike(wide) and case.clip is None:
        power = max(k for k in range(below, 25) if by_hand(case, HALF, 2.0**k).finite)
        found["larger loss scale"] = by_hand(case, HALF, 2.0**power).near(wide)
    else:
        power = None
    if plain.finite and not plain.steady(wide):
        found["larger eps"] = bool(eps_of(case, wide, scale)) and plain.alike(wide)
    if power is not None:
        found |= with_another(case, wide, 2.0**power, alone=found)
    if case.clip is not None:
        for name, order in (("after unscaling", "after"), ("before unscaling", "before"), ("in float32", "wide")):
            found[f"clipping {name}"] = by_hand(case, HALF, scale, clip=order).near(wide)
    return found


def eps_of(case: Case, wide: Hand, scale: float) -> str | None:
    """The smallest eps with which the optimiser's step is like float32's."""
    for power in range(7, 0, -1):
        if by_hand(case, HALF, scale, eps=float(f"1e-{power}")).steady(wide):
            return f"1e-{power}"
    return None


def with_another(case: Case, wide: Hand, scale: float, alone: dict[str, bool]) -> dict[str, bool]:
    """A loss scale with which gradients are well and what follows is not, and what mends that."""
    now = by_hand(case, HALF, scale)
    name = f"loss scale {f'{scale:,.0f}' if scale >= 1 else f'{scale:g}'} and"
    found = {}
    if now.alike(wide) and not now.steady(wide):
        eps = eps_of(case, wide, scale)
        found[f"{name} eps {eps}"] = eps is not None and by_hand(case, HALF, scale, eps=float(eps)).near(wide)
        if not alone["master weights"]:
            found[f"{name} master weights"] = by_hand(case, HALF, scale, autocast=True).near(wide)
    elif now.finite and case.clip is not None and not now.alike(wide):
        found[f"{name} clipping in float32"] = by_hand(case, HALF, scale, clip="wide").near(wide)
    return found


@pytest.mark.table
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_cures_by_hand_is_tried_and_shown_to(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = diagnose_training(case.make, loss_scale=case.loss_scale, clip=case.clip)
        expected = cures(case)
        plain = by_hand(case, HALF, case.loss_scale).near(by_hand(case, torch.float32, case.loss_scale))
    assert found.plain.cured == plain
    tried = {trial.name: trial.cured for trial in found.trials}
    if plain:
        assert "control" in case.name
        assert set(tried) <= {"bfloat16", "float32"}
        return
    assert {name: tried.get(name, False) for name in expected} == expected, found.advice
    pairs = [name for name, is_cure in expected.items() if " and " in name and is_cure]
    assert bool(pairs) == ("Both are needed" in found.advice), found.advice
    for trial in found.trials:
        if not trial.cured:
            assert not re.search(rf"(?<!and ){re.escape(trial.name)}(?: \(2\^-?\d+\))?: finite", found.advice)
