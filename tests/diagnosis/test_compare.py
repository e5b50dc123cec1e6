"""Two recordings joined site by site: what is in both, how far apart, and what NaN, infinities and gaps become."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from recordings import HEADER, lost_everything, made

import stabilitykit as sk
from stabilitykit.errors import MisuseError
from stabilitykit.records import Deviation, Recording

WIDE = replace(HEADER, dtype="float32")
TINY = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512"


def test_sites_are_joined_by_step_and_order_and_gaps_are_named() -> None:
    a = Recording(HEADER, [made(0, "x"), made(1, "x"), made(2, "only.a"), made(3, "y"), made(4, "x", step=1)])
    b = Recording(WIDE, [made(0, "x"), made(1, "only.b"), made(2, "y"), made(3, "x", step=1), made(4, "z", step=1)])
    found = sk.compare(a, b)
    assert list(zip(found.step, found.site, found.found, strict=True)) == [
        (0, "x", "both"), (0, "only.b", "b"), (0, "x", "a"), (0, "only.a", "a"), (0, "y", "both"),
        (1, "x", "both"), (1, "z", "b"),
    ]  # fmt: skip
    gaps = found[found.found != "both"]
    assert gaps[["amax_ulp", "amax_db", "rms_db"]].isna().all(axis=None)
    assert gaps.amax_a.isna().tolist() == [True, False, False, True]
    assert list(found.lost_a.isna()) == [False, True, False, False, False, False, True]


def ulp(ours: float | None, theirs: float | None, dtype: str = "float16", **of_a: int) -> float:
    a = Recording(replace(HEADER, dtype=dtype), [made(0, "x", amax=ours, dtype=dtype, **of_a)])
    b = Recording(WIDE, [made(0, "x", amax=theirs, dtype="float32")])
    there, back = sk.compare(a, b).amax_ulp.item(), sk.compare(b, a).amax_ulp.item()
    assert there == back or (math.isnan(there) and math.isnan(back))  # whichever is named first
    return float(there)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ulps_are_the_narrower_dtypes_at_the_wider_ones_magnitude(dtype: str) -> None:
    for theirs in (1.0, 1.5, 3.99, 1000.0, 2.0**-13):
        gap = 2.0 ** math.floor(math.log2(theirs)) * torch.finfo(getattr(torch, dtype)).eps  # as torch has it
        assert ulp(theirs + gap, theirs, dtype) == pytest.approx(1.0, rel=1e-9)
        assert ulp(theirs - 3 * gap, theirs, dtype) == pytest.approx(3.0, rel=1e-9)
    tiny = torch.finfo(getattr(torch, dtype)).smallest_normal
    assert ulp(tiny / 2, 0.0, dtype) == pytest.approx(0.5 / torch.finfo(getattr(torch, dtype)).eps)


def test_what_is_lost_has_no_distance_or_an_infinite_one() -> None:
    assert ulp(8.0, 8.0, nan=1) == math.inf
    assert math.isnan(ulp(None, 8.0))
    both = sk.compare(Recording(HEADER, [lost_everything(0, "x")]), Recording(HEADER, [made(0, "x", nan=2)]))
    assert math.isnan(both.amax_ulp.item())
    assert (both.lost_a.item(), both.lost_b.item()) == (12, 2)


def test_decibels_are_of_the_ratio() -> None:
    a = Recording(HEADER, [made(0, "x", amax=20.0, rms=0.0), made(1, "y", amax=0.0, rms=0.0)])
    b = Recording(WIDE, [made(0, "x", amax=2.0, rms=1.0), made(1, "y", amax=1.0, rms=0.0)])
    found = sk.compare(a, b)
    np.testing.assert_allclose(found.amax_db, [20.0, -math.inf])
    np.testing.assert_allclose(found.rms_db, [-math.inf, math.nan])


def test_the_deviation_is_the_narrower_runs_own() -> None:
    measured = Deviation(sqnr=41.5, largest=0.5, largest_ulp=2.0, compared=12)
    a = Recording(HEADER, [made(0, "x", deviation=measured), made(1, "y")])
    b = Recording(WIDE, [made(0, "x", dtype="float32"), made(1, "y", dtype="float32")])
    for found in (sk.compare(a, b), sk.compare(b, a)):
        np.testing.assert_equal(found.sqnr.to_numpy(), [41.5, math.nan])
        np.testing.assert_equal(found.largest_ulp.to_numpy(), [2.0, math.nan])


def test_two_real_runs() -> None:
    runs = sk.profile(TINY, "Hi", dtypes=["float16", "float32"])
    found = sk.compare(runs["float16"], runs["float32"])
    both = found[found.found == "both"]
    assert set(both.site) == set(runs["float16"].frame.site) & set(runs["float32"].frame.site)
    assert both.largest_ulp.notna().all()  # every one was measured while they ran
    stored = both[both.stored & (both.layer.notna())]
    assert 0 < stored.amax_ulp.max() < 200
    assert (stored.amax_ulp <= stored.largest_ulp * 2).mean() > 0.9  # two measures of one rounding
    assert sk.compare(runs["float32"], runs["float32"])[["amax_ulp", "amax_db"]].fillna(0).eq(0).all(axis=None)


def test_positions_are_joined_where_both_kept_them() -> None:
    kept = []
    for dtype in ("float16", "float32"):
        model = sk.load(TINY, dtype=dtype)
        with torch.inference_mode(), sk.record(model, position_peaks=True) as recording:
            model(torch.tensor([[2, 70, 71]]))
        kept.append(recording)
    found = sk.compare(*kept, positions=True)
    residual = found[found.site == "layers.1"]
    assert list(residual.position) == [0, 1, 2]
    assert list(residual.row) == [0, 0, 0]
    np.testing.assert_allclose(residual.amax_a, kept[0].at("layers.1").position_amax)  # type: ignore[arg-type]
    assert 0 < residual.amax_ulp.max() < 100

    with pytest.raises(MisuseError, match="position_peaks=True"):
        sk.compare(kept[0], Recording(WIDE, [made(0, "layers.1")]), positions=True)


def test_two_empty_recordings_have_the_columns() -> None:
    empty, whole = Recording(HEADER, []), Recording(HEADER, [made(0, "x")])
    assert sk.compare(empty, empty).dtypes.equals(sk.compare(whole, whole).dtypes)
