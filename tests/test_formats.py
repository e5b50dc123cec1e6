"""The formats against ml_dtypes: its descriptions of them, its casts on either side of every limit, and every code."""

import doctest
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from stabilitykit import formats
from stabilitykit.errors import MisuseError
from stabilitykit.formats import FORMATS, NumberFormat, number_format

# Formats that are not registered: every signed one that ml_dtypes knows can be said in one literal too.
SAYABLE = [
    NumberFormat(name="float8_e4m3", precision=4, emax=7, emin=-6, bits=8),
    NumberFormat(name="float8_e3m4", precision=5, emax=3, emin=-2, bits=8),
    NumberFormat(
        name="float8_e4m3fnuz", precision=4, emax=7, emin=-7, bits=8, past_maximum="NaN", has_negative_zero=False
    ),
    NumberFormat(
        name="float8_e5m2fnuz", precision=3, emax=15, emin=-15, bits=8, past_maximum="NaN", has_negative_zero=False
    ),
    NumberFormat(
        name="float8_e4m3b11fnuz", precision=4, emax=4, emin=-10, bits=8, past_maximum="NaN", has_negative_zero=False
    ),
    NumberFormat(name="float6_e2m3fn", precision=4, emax=2, emin=0, bits=6, past_maximum="saturate"),
    NumberFormat(name="float6_e3m2fn", precision=3, emax=4, emin=-2, bits=6, past_maximum="saturate"),
    NumberFormat(name="float4_e2m1fn", precision=2, emax=2, emin=0, bits=4, past_maximum="saturate"),
]
ALL = [*FORMATS.values(), *(form for form in SAYABLE if form.name not in FORMATS)]
NARROW = [form for form in ALL if form.bits < 32]


def independent(form: NumberFormat) -> Any:
    """numpy's or ml_dtypes' type of that name."""
    return getattr(np, form.name, None) or getattr(ml_dtypes, form.name)


def cast(value: float, form: NumberFormat) -> float:
    with np.errstate(all="ignore"):
        return float(np.float32(value).astype(independent(form)))  # ml_dtypes reads float32


def every_value(form: NumberFormat) -> NDArray[np.float64]:
    codes = np.arange(2**form.bits, dtype=np.uint16 if form.bits > 8 else np.uint8)
    with np.errstate(invalid="ignore"):  # of signalling NaN
        values: NDArray[np.float64] = codes.view(independent(form)).astype(np.float64)
    return values


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.name)
def test_derived_values(form: NumberFormat) -> None:
    info = ml_dtypes.finfo(independent(form))
    assert form.largest == float(info.max)
    assert form.smallest_normal == float(info.smallest_normal)
    assert form.smallest_subnormal == float(info.smallest_subnormal)
    assert 2 * form.unit_roundoff == float(info.eps)
    assert form.bits == info.bits


@pytest.mark.parametrize("form", NARROW, ids=lambda form: form.name)
def test_which_codes_are_finite(form: NumberFormat) -> None:
    values = every_value(form)
    assert form.finite_codes == np.isfinite(values).sum()
    assert form.has_infinities == np.isinf(values).any()
    assert form.has_negative_zero == (np.signbit(values) & (values == 0)).any()
    assert form.largest == np.abs(values[np.isfinite(values)]).max()


@pytest.mark.parametrize("form", NARROW, ids=lambda form: form.name)
def test_overflow_is_what_a_cast_does(form: NumberFormat) -> None:
    """Where a cast saturates, what overflows and what rounds down to the largest look alike."""
    edge, tie_overflows = form.overflow_edge
    below, above = (float(np.nextafter(np.float32(edge), np.float32(to))) for to in (0, np.inf))
    becomes = {"inf": math.inf, "NaN": math.nan, "saturate": form.largest}[form.past_maximum]
    for value in (form.largest, edge, below, above, 2 * edge, -edge, -above, math.inf):
        made = math.copysign(becomes, value) if form.overflows(value) else math.copysign(form.largest, value)
        assert cast(value, form) == pytest.approx(made, rel=0, nan_ok=True), value
    assert not form.overflows(below)
    assert form.overflows(above)
    assert form.overflows(edge) == tie_overflows == (form.high_nans == 0)
    assert form.overflows(math.nan)
    assert not form.overflows(-0.0)


def test_casts_to_8_bits_and_fewer_may_saturate() -> None:
    assert {form.name for form in FORMATS.values() if form.saturates(asked=True)} >= {"float8_e4m3fn", "float8_e5m2"}
    assert not any(form.saturates(asked=True) for form in ALL if form.bits > 8)
    assert {form.name for form in SAYABLE if form.saturates()} == {"float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"}


def test_headroom_is_in_bits() -> None:
    float16 = FORMATS["float16"]
    assert float16.headroom(65504.0 / 4) == 2.0
    assert float16.headroom(2 * 65504.0) == -1.0
    assert float16.headroom(0.0) == math.inf
    assert float16.headroom(math.inf) == -math.inf
    assert FORMATS["float64"].headroom(5e-324) > 2097


def test_unknown_names_are_told_the_known_ones() -> None:
    with pytest.raises(MisuseError, match=r"^Unknown number format 'float12'; choose one of: float64, float32, .*\.$"):
        number_format("float12")
    assert number_format("torch.float16").name == "float16"


def test_the_examples_in_the_docstring() -> None:
    assert doctest.testmod(formats) == doctest.TestResults(failed=0, attempted=2)
