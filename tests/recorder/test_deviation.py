"""Deviations from a reference run are what plain float64 arithmetic makes of the same two tensors."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from stabilitykit.formats import FORMATS, NumberFormat, number_format
from stabilitykit.models.gemma import Gemma
from stabilitykit.recorder import record
from stabilitykit.recorder.deviation import measure_deviation as tally_deviation
from stabilitykit.records import Deviation

Small = Callable[..., Gemma]
Floats = npt.NDArray[np.float64]


def measure_deviation(ours: torch.Tensor, theirs: torch.Tensor, stored: NumberFormat) -> Deviation | None:
    found = tally_deviation(ours, theirs, stored)
    return None if found is None else found.result()


def double(tensor: torch.Tensor) -> Floats:
    return tensor.double().numpy()


def expected(ours: Floats, theirs: Floats, dtype: str) -> Deviation:
    """By the definitions, for arrays that are finite and hold an error and a signal."""
    info = {"float32": (24, -126), "float16": (11, -14), "bfloat16": (8, -126)}[dtype]  # precision, smallest exponent
    error = np.abs(ours - theirs)
    with np.errstate(divide="ignore"):
        exponent = np.maximum(np.floor(np.log2(np.abs(theirs))), info[1])
    return Deviation(
        sqnr=pytest.approx(10 * np.log10(np.sum(theirs**2) / np.sum(error**2)), rel=1e-12),  # type: ignore[arg-type]
        largest=float(error.max()),
        largest_ulp=float((error / 2.0 ** (exponent - (info[0] - 1))).max()),
        compared=error.size,
    )


def outputs_of(model: Gemma, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that are compared, by hooks of the test's own."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList) and name != "rotary_emb":
            handles.append(
                module.register_forward_hook(lambda module, args, out, name=name: found.update({name: out.clone()}))
            )
        layer, _, kind = name.rpartition(".")
        # What the norm before the MLP reads is the sum after attention.
        if kind == ("pre_feedforward_layernorm" if model.config.post_norms else "post_attention_layernorm"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, site=f"{layer}/add.0": found.update({site: args[0].clone()})
                )
            )
    with torch.inference_mode():
        model(ids)
    for handle in handles:
        handle.remove()
    return {site: tensor for site, tensor in found.items() if not site.endswith((".self_attn", ".mlp"))}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_a_run_is_compared_with_what_another_kept(
    small: Small, tokens: torch.Tensor, generation: int, dtype: str
) -> None:
    reference, model = small(generation), small(generation, dtype)
    kept: dict[str, torch.Tensor] = {}
    with torch.inference_mode(), record(reference, keep=kept):
        reference(tokens)
    theirs, ours = outputs_of(reference, tokens), outputs_of(model, tokens)
    # RoPE's tables stand under the names of the module's two outputs, or of the operators that made them.
    assert {site for site in kept if not site.startswith("rotary_emb")} == set(theirs)
    for site, tensor in theirs.items():
        assert torch.equal(kept[site], tensor), site

    with torch.inference_mode(), record(model, against=kept) as recording:
        model(tokens)
    checked = 0
    for found in recording:
        if found.site in theirs:
            wanted = expected(double(ours[found.site]), double(theirs[found.site]), dtype)
            assert found.deviation == wanted, found.site
            checked += 1
        elif found.site not in kept:
            assert found.deviation is None, found.site
    assert checked == len(theirs)
    logits = recording.at("lm_head").deviation
    assert logits is not None
    assert 20 < logits.sqnr < 90  # dB: the check above is not of nothing against nothing


def test_the_same_run_again_has_no_error(small: Small, tokens: torch.Tensor) -> None:
    model = small(3, "float16")
    kept: dict[str, torch.Tensor] = {}
    with torch.inference_mode(), record(model, keep=kept):
        model(tokens)
    with torch.inference_mode(), record(model, against=kept) as recording:
        model(tokens)
    found = {r.site: r.deviation for r in recording if r.deviation is not None}
    assert found.keys() == kept.keys()
    for site, deviation in found.items():
        assert deviation == Deviation(sqnr=math.inf, largest=0.0, largest_ulp=0.0, compared=kept[site].numel())


def test_what_is_kept_is_a_copy_of_the_last_step(small: Small) -> None:
    model = small(3)
    kept: dict[str, torch.Tensor] = {}
    with torch.inference_mode(), record(model, keep=kept):
        model(torch.tensor([[2, 70, 71]]))
        model(torch.tensor([[2, 80, 81, 82]]))
    last = outputs_of(model, torch.tensor([[2, 80, 81, 82]]))
    assert all(torch.equal(kept[site], tensor) for site, tensor in last.items())
    memory = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(tensor.data_ptr() not in memory for tensor in kept.values())


def test_a_run_of_other_tokens_has_no_deviation_where_shapes_differ(small: Small) -> None:
    model = small(3)
    kept: dict[str, torch.Tensor] = {}
    with torch.inference_mode(), record(model, keep=kept):
        model(torch.tensor([[2, 70, 71]]))
    with torch.inference_mode(), record(model, against=kept) as recording:
        model(torch.tensor([[2, 70, 71, 72]]))
    assert all(r.deviation is None for r in recording)


def test_a_run_that_breaks_is_compared_where_it_is_finite(small: Small, tokens: torch.Tensor) -> None:
    """A rescaled run's float32 reference is finite; of the broken one only what is left counts."""
    reference, model = small(3, rescale=2.0**15), small(3, "float16", 2.0**15)
    kept: dict[str, torch.Tensor] = {}
    with torch.inference_mode(), record(reference, keep=kept):
        reference(tokens)
    with torch.inference_mode(), record(model, against=kept) as recording:
        model(tokens)
    assert recording.first_break() is not None
    found = [r for r in recording if r.deviation is not None]
    for r in found:
        assert r.deviation is not None
        assert r.deviation.compared == r.elements - r.lost
        assert (r.deviation.largest is None) == (r.lost == r.elements)
    assert any(0 < r.lost < r.elements for r in found)
    logits = recording.at("lm_head").deviation
    assert logits == Deviation(sqnr=None, largest=None, largest_ulp=None, compared=0)


INF, NAN = math.inf, math.nan


def test_elements_count_where_both_are_finite() -> None:
    form = number_format("float16")
    ours = torch.tensor([1.0, INF, NAN, 2.0, 3.0, -INF, 4.5])
    theirs = torch.tensor([1.5, INF, 1.0, NAN, 3.0, 7.0, 4.0])
    # The first, fifth and last: squared errors 1/4, 0, 1/4; squared references 2.25, 9, 16; ulps of 2^-10, 2^-9, 2^-8.
    found = measure_deviation(ours, theirs, form)
    assert found == Deviation(
        sqnr=pytest.approx(10 * math.log10(27.25 / 0.5)),  # type: ignore[arg-type]
        largest=0.5,
        largest_ulp=512.0,
        compared=3,
    )
    nothing = Deviation(sqnr=None, largest=None, largest_ulp=None, compared=0)
    assert measure_deviation(torch.tensor([NAN, INF]), torch.tensor([1.0, INF]), form) == nothing
    assert measure_deviation(torch.tensor([]), torch.tensor([]), form) == nothing
    assert measure_deviation(torch.ones(3), torch.ones(4), form) is None


def test_a_reference_of_zeros_has_no_ratio() -> None:
    form = number_format("bfloat16")
    zeros = torch.zeros(3)
    assert measure_deviation(zeros, zeros, form) == Deviation(sqnr=None, largest=0.0, largest_ulp=0.0, compared=3)
    found = measure_deviation(torch.tensor([0.0, 2.0**-100, 0.0]), zeros, form)
    assert found == Deviation(sqnr=None, largest=2.0**-100, largest_ulp=2.0 ** (-100 + 126 + 7), compared=3)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_an_ulp_is_the_gap_above_the_references_magnitude(name: str) -> None:
    """One ulp of error at powers of two, just below them, at the edge of the subnormals, among them and at zero."""
    form = FORMATS[name]
    if form.emin < -900:
        pytest.skip("has no room beneath it in float64, in which errors are computed")
    least = 2.0 ** (form.emin - form.precision + 1)
    for reference, ulp in (
        (1.0, 2.0 ** (1 - form.precision)),
        (-1.0, 2.0 ** (1 - form.precision)),
        (2.0 - 2.0 ** (1 - form.precision), 2.0 ** (1 - form.precision)),
        (2.0, 2.0 ** (2 - form.precision)),
        (2.0**form.emin, least),
        (least, least),
        (0.0, least),
    ):
        theirs = torch.tensor([reference], dtype=torch.float64)
        for errors in (1.0, -1.0, 0.5, 3.0):
            found = measure_deviation(theirs + errors * ulp, theirs, form)
            assert found is not None
            assert (found.largest_ulp, found.largest) == (abs(errors), abs(errors) * ulp), (reference, errors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_taken_in_float64(dtype: torch.dtype) -> None:
    """Squares of a format's largest numbers leave it; those of a hundred thousand small errors would round away."""
    name = str(dtype).removeprefix("torch.")
    largest = float(torch.finfo(dtype).max)
    ours = torch.full((100_000,), largest / 2, dtype=dtype)
    theirs = torch.full((100_000,), largest, dtype=dtype)
    ours[0] = theirs[0]
    assert measure_deviation(ours, theirs, number_format(name)) == expected(double(ours), double(theirs), name)
    torch.manual_seed(0)
    theirs = torch.randn(400, 250)
    ours = theirs.to(dtype) if dtype != torch.float32 else theirs * (1 + 2.0**-20)
    assert measure_deviation(ours, theirs, number_format(name)) == expected(double(ours), double(theirs), name)
