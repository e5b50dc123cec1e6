"""The formats against ml_dtypes' own descriptions of them, and against its casts on either side of every limit."""

import math

import ml_dtypes
import numpy as np
import pytest

from stabilitykit.errors import MisuseError
from stabilitykit.formats import FORMATS, NumberFormat, number_format

INDEPENDENT = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_derived_values(form: NumberFormat) -> None:
    info = ml_dtypes.finfo(INDEPENDENT[form.name])
    assert form.largest == float(info.max)
    assert form.smallest_normal == float(info.smallest_normal)
    assert form.smallest_subnormal == float(info.smallest_subnormal)
    assert 2 * form.unit_roundoff == float(info.eps)
    assert form.bits == info.bits


@pytest.mark.parametrize("form", [f for f in FORMATS.values() if f.bits < 32], ids=lambda form: form.name)
def test_overflow_is_what_a_cast_does(form: NumberFormat) -> None:
    edge, _ = form.overflow_edge
    below, above = (
        float(np.nextafter(np.float32(edge), np.float32(to))) for to in (0, np.inf)
    )  # ml_dtypes reads float32
    for value in (
        form.largest,
        edge,
        below,
        above,
        -edge,
        math.inf,
        math.nan,
    ):
        with np.errstate(all="ignore"):
            cast = np.float32(value).astype(INDEPENDENT[form.name]).astype(np.float64)
        assert form.overflows(value) == (not np.isfinite(cast)), value


def test_headroom_is_in_bits() -> None:
    float16 = FORMATS["float16"]
    assert float16.headroom(65504.0 / 4) == 2.0
    assert float16.headroom(2 * 65504.0) == -1.0
    assert float16.headroom(0.0) == math.inf
    assert float16.headroom(math.inf) == -math.inf
    assert FORMATS["float64"].headroom(5e-324) > 2097


def test_unknown_names_are_told_the_known_ones() -> None:
    with pytest.raises(MisuseError, match=r"one of float64, float32.*'float12' is none"):
        number_format("float12")
    assert number_format("torch.float16").name == "float16"
