"""Reading a length map: what holds at each length, and from which run."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from swept import broke, broken_map, check, clean_map, header, peak

from stabilitykit.errors import MisuseError
from stabilitykit.records.lengths import LengthMap, Span

# 1 to 4 tokens come from a run of 4 that does not break; from 5 on layer 1's site breaks, and a third site after it
# knows nothing.
TWO_RUNS = LengthMap(
    header(),
    (
        Span(first=1, last=4, run=4),
        Span(first=5, last=8, run=8, site="b", order=2, broke=broke()),
    ),
    (
        peak(4, 0, 10.0, "a", 1),
        peak(4, 1, 30.0, "b", 2),
        peak(4, 3, 20.0, "a", 1),
        peak(8, 0, 11.0, "a", 1),
        peak(8, 1, 31.0, "b", 2),
        peak(8, 3, 21.0, "a", 1),
        peak(8, 6, 99.0, "a", 1),
        peak(8, 0, 1e9, "c", 3),
    ),
)


def test_the_curve_is_the_largest_known_peak_at_every_length() -> None:
    assert TWO_RUNS.curve().tolist() == [10.0, 30.0, 30.0, 30.0, 21.0, 21.0, 99.0, 99.0]
    for length in range(1, 9):
        found = TWO_RUNS.peak(length)
        assert found is not None
        assert found[1] == TWO_RUNS.curve()[length - 1]


def test_a_length_at_which_nothing_is_known_is_nan() -> None:
    spans = (Span(first=1, last=2, run=2, site="a", order=1, broke=broke()), Span(first=3, last=4, run=4))
    found = LengthMap(header(), spans, (peak(2, 0, 5.0, "a", 1), peak(4, 3, 7.0, "a", 1)))
    assert np.isnan(found.curve()[:3]).all()
    assert found.curve()[3] == 7.0
    assert found.peak(1) is None


def test_the_curve_of_many_sites_agrees_with_single_lookups() -> None:
    made = np.random.default_rng(0)
    peaks = tuple(
        peak(2048, int(at), float(value), f"s{index % 300}", index % 300)
        for index, (at, value) in enumerate(zip(made.integers(0, 2048, 3000), made.random(3000), strict=True))
    )
    rising: dict[str, float] = {}
    kept = []
    for entry in sorted(peaks, key=lambda entry: entry.position):
        if entry.amax > rising.get(entry.site, 0.0):
            rising[entry.site] = entry.amax
            kept.append(entry)
    found = LengthMap(header(), (Span(first=1, last=2048, run=2048),), tuple(kept))
    curve = found.curve()
    for length in (100, 1000, 2048):
        largest = found.peak(length)
        assert largest is not None
        assert largest[1] == curve[length - 1]


def test_a_length_map_is_looked_up_by_length() -> None:
    assert (TWO_RUNS.longest, TWO_RUNS.first_broken, TWO_RUNS.runs) == (8, 5, 2)
    assert (TWO_RUNS.span(4).run, TWO_RUNS.span(5).run) == (4, 8)
    assert (TWO_RUNS.sites(4), TWO_RUNS.sites(5)) == (["a", "b"], ["a"])
    assert [TWO_RUNS.amax("a", length) for length in (1, 3, 4, 5, 7)] == [10.0, 10.0, 20.0, 21.0, 99.0]
    assert TWO_RUNS.amax("elsewhere", 1) is None
    assert clean_map().first_broken is None
    for outside in (0, 9):
        with pytest.raises(ValueError, match="length must be from 1 to 8"):
            TWO_RUNS.span(outside)


def test_a_length_map_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    made = broken_map(checks=(check(), replace(check(), ulp=math.inf)))
    made.save(tmp_path / "a.parquet")
    loaded = LengthMap.load(tmp_path / "a.parquet")
    assert (loaded.header, loaded.spans, loaded.peaks, loaded.checks) == (
        made.header,
        made.spans,
        made.peaks,
        made.checks,
    )
    with pytest.raises(MisuseError, match="never overwrites"):
        made.save(tmp_path / "a.parquet")
