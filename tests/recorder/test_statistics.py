"""The statistics agree with float64 arithmetic and with ml_dtypes' casts, on every kind of float."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabilitykit.formats import FORMATS, number_format
from stabilitykit.recorder.kernels import cpu, plain
from stabilitykit.recorder.kernels.layout import edges
from stabilitykit.recorder.statistics import decode, joined, measure

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TARGETS = {
    name: getattr(np, name, None) or getattr(ml_dtypes, name) for name, form in FORMATS.items() if form.bits < 64
}
INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def edge_values() -> list[float]:
    """Every format's limits and ties, and their neighbours in float64."""
    values = [0.0, -0.0, math.inf, -math.inf, math.nan]
    for form in FORMATS.values():
        half = form.smallest_subnormal / 2
        for value in (
            form.largest,
            form.overflow_edge[0],
            form.smallest_normal,
            form.smallest_normal - half,
            form.smallest_subnormal,
            half,
        ):
            values += [value, -value, math.nextafter(value, math.inf), math.nextafter(value, 0.0)]
    return values


def rounded(values: np.ndarray, name: str) -> np.ndarray:
    """float64 rounded to a narrower format, ties to even, by scaling to units of its last place."""
    form = number_format(name)
    exponents = np.maximum(np.frexp(values)[1] - 1, form.emin) - form.precision + 1
    with np.errstate(over="ignore"):
        result = np.ldexp(np.rint(np.ldexp(values, -exponents)), exponents)
    return np.where(np.abs(result) > form.largest, np.inf, result)


def check_against_float64(tensor: torch.Tensor) -> None:
    found = measure(tensor, tuple(TARGETS))
    wide = tensor.double().numpy().ravel()
    finite = wide[np.isfinite(wide)]
    magnitudes = np.abs(finite)
    own = number_format(str(tensor.dtype))
    assert found.elements == wide.size
    assert found.nan == np.isnan(wide).sum()
    assert found.positive_inf == (wide == np.inf).sum()
    assert found.negative_inf == (wide == -np.inf).sum()
    assert found.zero == (finite == 0).sum()
    assert found.subnormal == ((magnitudes > 0) & (magnitudes < own.smallest_normal)).sum()
    if finite.size == 0:
        assert found.amax is None
        assert found.mean is None
        assert found.amax_index is None
        return
    assert found.amax == magnitudes.max()
    assert found.minimum == finite.min()
    assert found.maximum == finite.max()
    assert found.amax_index is not None
    assert np.ravel_multi_index(found.amax_index, tensor.shape) == np.flatnonzero(np.abs(wide) == found.amax)[0]
    nonzero = magnitudes[magnitudes > 0]
    assert found.smallest == (nonzero.min() if nonzero.size else None)
    histogram = {found.exponent_first + i: count for i, count in enumerate(found.exponents) if count}
    exponents, counts = np.unique(np.frexp(nonzero)[1] - 1, return_counts=True)
    assert histogram == dict(zip(exponents.tolist(), counts.tolist(), strict=True))
    scale = magnitudes.max() or 1.0
    assert found.rms == pytest.approx(scale * math.sqrt(np.mean((finite / scale) ** 2)), rel=1e-9)
    assert found.mean == pytest.approx(float(np.mean(finite / scale)) * scale, rel=1e-9, abs=1e-12 * scale)
    for name, target in TARGETS.items():
        if tensor.dtype == torch.float64:
            cast = rounded(finite, name)  # ml_dtypes would go through float32 and round twice
        else:
            with np.errstate(all="ignore"):
                cast = finite.astype(np.float32).astype(target).astype(np.float64)
        smallest = number_format(name).smallest_normal
        counts_found = found.formats[name]
        assert counts_found.overflow == (~np.isfinite(cast)).sum(), name
        assert counts_found.zero == ((cast == 0) & (finite != 0)).sum(), name
        assert counts_found.subnormal == ((cast != 0) & (np.abs(cast) < smallest)).sum(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_pattern(dtype: torch.dtype) -> None:
    check_against_float64(torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_ties_and_their_neighbours(dtype: torch.dtype) -> None:
    values = torch.tensor(edge_values(), dtype=torch.float64).to(dtype)
    codes = values.view(INTEGERS[dtype])
    check_against_float64(torch.cat([values, (codes + 1).view(dtype), (codes - 1).view(dtype)]))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=24),
)
def test_any_bits(dtype: torch.dtype, bits: list[int]) -> None:
    width = torch.iinfo(INTEGERS[dtype]).bits
    codes = torch.tensor([b >> (64 - width) for b in bits], dtype=torch.int64).to(INTEGERS[dtype])
    check_against_float64(codes.view(dtype))


def test_strides_do_not_matter_and_the_index_is_in_the_tensors_own_shape() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2)
    assert measure(tensor, ()).amax_index == (3, 2, 1)
    check_against_float64(tensor)
    check_against_float64(torch.arange(24.0).reshape(4, 6)[::2, 1::2])


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_empty_and_scalar(shape: tuple[int, ...]) -> None:
    found = measure(torch.ones(shape), ("float16",))
    assert found.elements == math.prod(shape)
    assert found.amax == (1.0 if shape == () else None)


def test_statistics_of_float16_do_not_overflow_in_float16() -> None:
    found = measure(torch.full((1000,), 60000.0, dtype=torch.float16), ())
    assert found.mean == 60000.0
    assert found.rms == pytest.approx(60000.0)


@pytest.mark.parametrize(
    "values", [[1.7e308, 1.7e308], [-1.7e308] * 3, [1.7e308, 1.7e308, -1.7e308, 1.0], [1.7976931348623157e308] * 7]
)
@pytest.mark.parametrize("repeats", [1, 5_000])
@pytest.mark.parametrize("kernel", ["of a CPU", "plain"])
def test_a_mean_fits_where_the_sum_does_not(values: list[float], repeats: int, kernel: str) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).repeat(repeats)
    against = edges(tensor.dtype, ())
    row = (plain if kernel == "plain" else cpu).tally(tensor, against)
    found = decode(np.asarray(row), against, tensor.shape)
    exact = float(sum(map(Fraction, values)) / len(values))
    assert found.mean == pytest.approx(exact, rel=1e-12)
    first, rest = (cpu.tally(part, against) for part in (tensor[:1], tensor[1:]))
    assert decode(joined(first, rest, None), against, tensor.shape).mean == pytest.approx(exact, rel=1e-12)


def test_a_mean_whose_sum_fits_is_the_sum_by_the_count() -> None:
    values = torch.tensor([1e200, -3e199, 7.0, 1e-300], dtype=torch.float64)  # whose squares do not fit
    assert measure(values, ()).mean == float(values.sum()) / 4


def test_nan_under_a_mask_is_masked() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -0.0])
    found = measure(values, ("float16",), torch.tensor([True, True, True, False, False]))
    assert (found.masked, found.nan, found.nonfinite, found.zero, found.mean) == (3, 0, 0, 1, 0.5)
    shown = measure(values, (), torch.tensor([False, True, True, False, False]))
    assert (shown.masked, shown.nan) == (2, 1)


def test_masked_elements_are_in_no_statistic() -> None:
    tensor = torch.tensor([1.0, -65504.0, -math.inf, 0.0], dtype=torch.float16)
    found = measure(tensor, ("float8_e4m3fn",), torch.tensor([False, True, True, False]))
    assert (found.elements, found.masked, found.negative_inf, found.zero) == (4, 2, 0, 1)
    assert (found.amax, found.minimum, found.mean) == (1.0, 0.0, 0.5)
    assert found.formats["float8_e4m3fn"].overflow == 0
    everything = measure(tensor, (), torch.ones(4, dtype=torch.bool))
    assert (everything.masked, everything.amax) == (4, None)


def test_float8_is_measured_through_float32() -> None:
    found = measure(torch.tensor([448.0, 2.0**-9]).to(torch.float8_e4m3fn), ())
    assert (found.amax, found.smallest) == (448.0, 2.0**-9)
