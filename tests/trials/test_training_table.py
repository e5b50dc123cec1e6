"""Of every training step that fails, what cures it by hand was tried and shown to, and nothing else was."""

import math
import warnings

import pytest
import torch
from trials.steps import CASES, Case, by_hand

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
    elif not plain.weights:
        found["larger eps"] = any(
            by_hand(case, HALF, scale, eps=eps).near(wide) for eps in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
        )
    elif not plain.near(wide) and case.clip is None:
        largest = max(k for k in range(below, 25) if by_hand(case, HALF, 2.0**k).finite)
        found["larger loss scale"] = by_hand(case, HALF, 2.0**largest).near(wide)
    if case.clip is not None:
        for name, order in (("after unscaling", "after"), ("before unscaling", "before"), ("in float32", "wide")):
            found[f"clipping {name}"] = by_hand(case, HALF, scale, clip=order).near(wide)
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
    for trial in found.trials:
        if not trial.cured:
            assert f"{trial.name}: finite" not in found.advice
