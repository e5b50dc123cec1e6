"""A tensor that is handed in has the record that it has where a model makes it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabilitykit.errors import MisuseError
from stabilitykit.formats import FORMATS
from stabilitykit.models.gemma import Gemma
from stabilitykit.recorder import Statistic, Where, describe, record
from stabilitykit.records import Record, Recording

Small = Callable[..., Gemma]

STATISTICS = [Statistic("negative", "fraction of elements", lambda x: (x < 0).double().mean())]


def recorded(model: nn.Module, tokens: Tensor, *sites: str) -> tuple[Recording, dict[str, Tensor]]:
    """A recording, and what the modules at `sites` returned, in the shape in which an operator made it."""
    made: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(site).register_forward_hook(
            lambda module, args, output, site=site: made.update({site: output.clone()})
        )
        for site in sites
    ]
    with torch.inference_mode(), record(model, position_peaks=True, statistics=STATISTICS) as recording:
        model(tokens)
    for hook in hooks:
        hook.remove()
    return recording, {site: output.reshape(recording.at(site).shape) for site, output in made.items()}


def where(of: Record, tokens: Tensor, **more: Any) -> Where:
    place = {name: getattr(of, name) for name in ("site", "label", "module", "operator", "layer", "step", "order")}
    return Where(**place, rows=tokens.shape[0], positions=tokens.shape[1], **more)


def check(found: Record, expected: Record) -> None:
    """Every field but tokens, which belong to a run, and the break, which needs its operands."""
    expected = dataclasses.replace(expected, amax_token=None, amax_token_text=None, broke=None)
    assert repr(found) == repr(expected)  # in which NaN equals NaN


@pytest.mark.parametrize("rescale", [1.0, 2.0**15])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_its_record_is_that_of_the_recorder(small: Small, dtype: str, rescale: float) -> None:
    tokens = torch.tensor([[2, 70, 71, 72], [2, 73, 74, 75]])
    sites = ("layers.1", "layers.1.mlp.down_proj", "layers.2.self_attn.q_norm", "lm_head")
    recording, made = recorded(small(3, dtype, rescale), tokens, *sites)
    assert (recording.first_break() is not None) == (dtype == "float16" and rescale > 1)
    for site in sites:
        expected = recording.at(site)
        found = describe(made[site], where(expected, tokens), position_peaks=True, statistics=STATISTICS)
        check(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_numpy_array_is_taken_and_may_be_wider_than_what_is_stored(small: Small, tokens: Tensor, dtype: str) -> None:
    recording, made = recorded(small(2, dtype), tokens, "layers.0.mlp.up_proj")
    expected = recording.at("layers.0.mlp.up_proj")
    wide = made["layers.0.mlp.up_proj"].double().numpy()
    stored = where(expected, tokens, dtype=dtype)
    check(describe(wide, stored, position_peaks=True, statistics=STATISTICS), expected)
    turned = np.ascontiguousarray(wide.swapaxes(0, 1)[::-1]).swapaxes(0, 1)[:, ::-1]
    turned.flags.writeable = False
    check(describe(turned, stored, position_peaks=True, statistics=STATISTICS), expected)


def test_its_numbers_are_numpys_own() -> None:
    array = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32) * 1e5
    array[1, 3, 2], array[0, 0, 0] = np.nan, 0.0
    found = describe(array, Where(site="layers.7.mlp/mul.0", operator="mul", rows=2, positions=5, start=10))
    finite = array[np.isfinite(array)].astype(np.float64)
    assert (found.elements, found.nan, found.lost, found.zero) == (80, 1, 1, 1)
    assert (found.amax, found.minimum, found.maximum) == (np.abs(finite).max(), finite.min(), finite.max())
    assert found.mean == pytest.approx(finite.mean(), rel=1e-12)
    assert found.rms == pytest.approx(math.sqrt((finite**2).mean()), rel=1e-12)
    row, position, channel = map(int, np.unravel_index(np.nanargmax(np.abs(array)), array.shape))
    assert (found.amax_row, found.amax_position, found.amax_channel) == (row, position + 10, channel)
    exponents = np.floor(np.log2(np.abs(finite[finite != 0]))).astype(int)
    for i, count in enumerate(found.exponents):
        assert count == (exponents == found.exponent_first + i).sum()
    assert sum(found.exponents) == len(exponents)
    assert found.formats["float16"].overflow == (np.abs(finite) >= FORMATS["float16"].overflow_edge[0]).sum() > 0
    assert (found.module, found.layer, found.dtype, found.shape) == ("layers.7.mlp", 7, "float32", (2, 5, 8))
    assert (found.lost_positions, found.lost_channels, found.broke) == (1, 1, None)


def test_masked_elements_enter_nothing_else() -> None:
    scores = np.array([[[[1.0, -np.inf], [3.0, 4.0]]]], dtype=np.float32)
    place = Where(site="layers.0.self_attn/add.0", rows=1, positions=2, scores=True)
    found = describe(scores, place, masked=np.isinf(scores), position_peaks=True)
    assert (found.masked, found.lost, found.minimum) == (1, 0, 1.0)
    assert found.position_amax == (1.0, 4.0)
    assert describe(scores, place).negative_inf == 1


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(dtype: str) -> None:
    found = describe([[0.5, -448.0 if dtype.endswith("fn") else -57344.0]], Where(site="x", dtype=dtype))
    assert (found.dtype, found.amax) == (dtype, FORMATS[dtype].largest)


@pytest.mark.parametrize(
    ("array", "place", "options", "said"),
    [
        (np.ones(3, int), {}, {}, r"expects floating-point numbers, got torch\.int64 at x"),
        ("text", {}, {}, "expects an array that torch.as_tensor takes"),
        ([0.1], {"dtype": "float16"}, {}, "at x holds numbers that float16 cannot hold exactly"),
        ([70000.0], {"dtype": "float16"}, {}, "cannot hold exactly"),
        ([1.0], {"dtype": "int8"}, {}, "unknown dtype 'int8'; choose one of: "),
        ([1.0], {}, {"masked": [True, False]}, r"boolean and of the array's shape, \[1\]; got torch\.bool, \[2\]"),
        ([1.0], {}, {"masked": [1.0]}, r"got torch\.float32"),
        ([1.0], {}, {"formats": ["int8"]}, "int8"),
        ([1.0], {}, {"statistics": [Statistic("amax", "", torch.max)]}, "already have a column 'amax'"),
    ],
)
def test_what_cannot_be_described_is_refused_in_a_sentence(array: Any, place: Any, options: Any, said: str) -> None:
    with pytest.raises(MisuseError, match=said):
        describe(array, Where(site="x", **place), **options)
