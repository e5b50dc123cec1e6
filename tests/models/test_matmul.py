"""Products summed in float32 are rounded once to 16 bits; everything else is torch's own, bit for bit."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from stabilitykit.checkpoints import open_checkpoint
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.errors import MisuseError
from stabilitykit.formats import number_format
from stabilitykit.models.gemma import Gemma, build, load
from stabilitykit.models.matmul import matmul, preferred_matmul
from stabilitykit.recorder import record
from stabilitykit.scaling.stressed import stressed

Floats = npt.NDArray[np.float64]
NARROW = [torch.float16, torch.bfloat16]
SPEC = "random:gemma3-270m?layers=2&hidden_size=64&feed_forward=96&heads=4&kv_heads=2&head_dim=16&vocabulary=400"


def rounded(values: Floats, dtype: torch.dtype) -> Floats:
    """Nearest, ties to even, past the overflow edge infinite: in float64, from the format's definition."""
    form = number_format(str(dtype))
    with np.errstate(divide="ignore"):
        exponent = np.maximum(np.floor(np.log2(np.abs(values))), form.emin)
    ulp = 2.0 ** (exponent - form.precision + 1)
    nearest = np.rint(values / ulp) * ulp
    return np.where(np.abs(nearest) > form.largest, np.copysign(np.inf, values), nearest)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Product = Callable[..., Tensor]
# Each with the shapes of its operands, and which two of them are multiplied; a third is added.
PRODUCTS: dict[str, tuple[Product, tuple[tuple[int, ...], ...], tuple[int, int]]] = {
    "mm": (torch.mm, ((7, 300), (300, 9)), (0, 1)),
    "bmm": (torch.bmm, ((3, 7, 300), (3, 300, 9)), (0, 1)),
    "matmul": (torch.matmul, ((2, 3, 7, 300), (2, 3, 300, 9)), (0, 1)),
    "matmul of a matrix": (torch.matmul, ((2, 7, 300), (300, 9)), (0, 1)),
    "transposed": (lambda a, b: a @ b.transpose(1, 2), ((2, 7, 300), (2, 9, 300)), (0, 1)),
    "linear": (F.linear, ((2, 7, 300), (9, 300)), (0, 1)),
    "linear with a bias": (F.linear, ((2, 7, 300), (9, 300), (9,)), (0, 1)),
    "addmm": (torch.addmm, ((9,), (7, 300), (300, 9)), (1, 2)),
    "baddbmm": (torch.baddbmm, ((3, 7, 9), (3, 7, 300), (3, 300, 9)), (1, 2)),
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_the_exact_one_rounded_once_within_the_error_of_a_float32_sum(
    name: str, dtype: torch.dtype, mode: Callable[[], AbstractContextManager[object]]
) -> None:
    """Some number within that error of the exact product rounds to each result: rounding is monotone."""
    product, shapes, _ = PRODUCTS[name]
    operands = [drawn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    with mode(), matmul("float32-accumulate"):
        result = product(*operands)
    assert result.dtype == dtype
    exact = product(*(operand.double() for operand in operands)).numpy()
    magnitudes = product(*(operand.double().abs() for operand in operands)).numpy()
    terms = 302  # and a bias; products of two 16-bit numbers are exact in float32
    bound = terms * 2.0**-24 / (1 - terms * 2.0**-24) * magnitudes
    found = result.double().numpy()
    assert (rounded(exact - bound, dtype) <= found).all()
    assert (found <= rounded(exact + bound, dtype)).all()
    # And the bound is tight enough to settle nearly all of them.
    assert (rounded(exact, dtype) == found).mean() > 0.97


@pytest.mark.parametrize("kind", ["float32-accumulate", "float16-accumulate:7"])
@pytest.mark.parametrize("name", [*PRODUCTS, "vector", "dot"])
def test_pieces_make_the_same_product(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small whole numbers, so that every order of summing gives the same."""
    vectors: dict[str, tuple[Product, tuple[tuple[int, ...], ...], tuple[int, int]]] = {
        "vector": (torch.mv, ((7, 300), (300,)), (0, 1)), "dot": (torch.dot, ((300,), (300,)), (0, 1)),
    }  # fmt: skip
    product, shapes, _ = (PRODUCTS | vectors)[name]
    operands = [(drawn(*shape, dtype=torch.float32, seed=seed) * 3).round().half() for seed, shape in enumerate(shapes)]
    with torch.inference_mode(), matmul(kind):
        whole = product(*operands)
    for sizes in ((1, 1, 1), (2, 700, 700), (4, 2000, 512)):
        for constant, value in zip(("_COLUMNS", "_LEFT", "BUFFER"), sizes, strict=True):
            monkeypatch.setattr(f"stabilitykit.models.matmul.{constant}", value)
        with torch.inference_mode(), matmul(kind):
            assert torch.equal(product(*operands), whole)
    assert torch.equal(whole.double(), product(*(operand.double() for operand in operands)))


@pytest.mark.parametrize("dtype", NARROW)
def test_a_tie_goes_to_the_even_number(dtype: torch.dtype) -> None:
    half = 2.0 ** -number_format(str(dtype)).precision  # of the gap above 1
    rows = torch.tensor([[1.0, half], [1.0, 3 * half], [1.0, -half / 2], [-1.0, -half], [1.0, 1.25 * half]]).to(dtype)
    with torch.inference_mode(), matmul("float32-accumulate"):
        result = rows @ torch.ones(2, 1, dtype=dtype)
    assert result.flatten().double().tolist() == [1.0, 1 + 4 * half, 1.0, -1.0, 1 + 2 * half]


def test_partial_sums_may_leave_float16_and_results_may_not() -> None:
    big = torch.full((1, 4), 60_000.0, dtype=torch.float16)
    cancelling = torch.tensor([[1.0], [1.0], [-1.0], [-0.5]], dtype=torch.float16)
    edge = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]], dtype=torch.float16)
    values = torch.tensor([[32_768.0], [32_736.0], [15.0], [0.0]], dtype=torch.float16)
    with torch.inference_mode(), matmul("float32-accumulate"):
        assert (big @ cancelling).item() == 30_000.0
        assert (big @ -torch.ones(4, 1, dtype=torch.float16)).item() == -math.inf
        assert (edge @ values).flatten().tolist() == [65_504.0, 32_752.0]  # 65,519 is nearer to 65,504 than to 65,536
        values[2] = 16.0
        assert (edge @ values).flatten().tolist() == [math.inf, 32_752.0]  # 65,520 is the tie, and even is past the end
        big[0, 0] = math.nan
        assert math.isnan((big @ cancelling).item())


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64])
def test_native_products_are_torchs_own(dtype: torch.dtype) -> None:
    for product, shapes, _ in PRODUCTS.values():
        operands = [drawn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
        bare = product(*operands)
        with matmul("native"):
            assert _get_current_dispatch_mode_stack() == []
            assert torch.equal(product(*operands), bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    for product, shapes, _ in PRODUCTS.values():
        if dtype == torch.int64:
            operands = [(10 * drawn(*shape, dtype=torch.float32)).to(dtype) for shape in shapes]
        else:
            operands = [drawn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
        bare = product(*operands)
        with matmul("float32-accumulate"):
            again = product(*operands)
        assert again.dtype == dtype
        assert torch.equal(again, bare)


def test_operands_of_two_dtypes_are_refused_as_ever() -> None:
    a, b = drawn(2, 3, dtype=torch.float16), drawn(3, 2, dtype=torch.bfloat16)
    with matmul("float32-accumulate"), pytest.raises(RuntimeError, match="same dtype"):
        a @ b


@pytest.mark.parametrize("dtype", NARROW)
def test_operators_that_are_no_products_are_left_alone(dtype: torch.dtype) -> None:
    x = drawn(5, 40, dtype=dtype)

    def others() -> list[Tensor]:
        return [x + x, x * 3.3, x.sum(-1), x.softmax(-1), F.gelu(x, approximate="tanh"), x.mean(-1)]

    bare = others()
    with matmul("float32-accumulate"):
        for found, expected in zip(others(), bare, strict=True):
            assert found.dtype == dtype
            assert torch.equal(found, expected)


def test_nothing_outlives_the_block() -> None:
    a, b = drawn(16, 4096, dtype=torch.bfloat16), drawn(4096, 16, dtype=torch.bfloat16, seed=1)
    before = a @ b
    with matmul("float32-accumulate"):
        assert len(_get_current_dispatch_mode_stack()) == 1
        a @ b
    assert _get_current_dispatch_mode_stack() == []
    assert torch.equal(a @ b, before)
    with pytest.raises(RuntimeError, match="shapes"), matmul("float32-accumulate"):
        a @ a
    assert _get_current_dispatch_mode_stack() == []
    assert torch.equal(a @ b, before)


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Gemma:
    return build(random_checkpoint(SPEC), dtype=request.param)


def test_a_recorder_inside_sees_16_bit_products_at_the_same_sites(model: Gemma) -> None:
    ids = torch.tensor([[2, 70, 71, 72, 73]])
    with torch.inference_mode(), record(model) as native:
        model(ids)
    with torch.inference_mode(), matmul("float32-accumulate"):
        bare = model(ids)
        with record(model, matmul="float32-accumulate") as recording:
            recorded = model(ids)
    assert torch.equal(bare, recorded)
    assert [(r.site, r.dtype, r.shape) for r in recording] == [(r.site, r.dtype, r.shape) for r in native]
    name = str(model.dtype).removeprefix("torch.")
    assert {r.dtype for r in recording if r.operator == "matmul"} == {name}
    assert (recording.header.matmul, native.header.matmul) == ("float32-accumulate", "native")


@pytest.mark.parametrize("kind", ["float32-accumulate", "float16-accumulate:4"])
def test_a_recording_changes_products_where_it_is_asked_to_and_says_what_was_in_force(model: Gemma, kind: str) -> None:
    ids = torch.tensor([[2, 70, 71, 72, 73]])
    with torch.inference_mode(), matmul(kind):
        expected = model(ids)
        with record(model) as inside:
            model(ids)
    with torch.inference_mode(), record(model, matmul=kind) as asked:
        found = model(ids)
    assert torch.equal(found, expected)
    assert inside.header.matmul == asked.header.matmul == kind
    assert _get_current_dispatch_mode_stack() == []
    with pytest.raises(MisuseError, match="unknown matmul mode 'float8'"), record(model, matmul="float8"):
        pass


def test_native_and_wider_products_break_at_the_same_place_and_agree_within_rounding(gguf_270m: Path) -> None:
    """The real model in float16: the same site and token, and before it breaks, logits that differ by rounding."""
    model = load("gemma3-270m", dtype="float16")
    broke = []
    for kind in ("native", "float32-accumulate"):
        with torch.inference_mode(), record(model, matmul=kind) as recording:
            model(torch.tensor([[2, 651, 6037, 576]]))
        first = recording.first_break()
        assert first is not None
        assert first.broke is not None
        broke.append((first.site, first.broke.kind, first.broke.position, first.broke.channel))
        assert first.broke.value == pytest.approx(68_384, abs=64)
    assert broke[0] == broke[1] == ("layers.7", "overflow", 0, broke[0][3])
    quarter = stressed(open_checkpoint("gemma3-270m"), 0.25, dtype="float16")
    logits = []
    for kind in ("native", "float32-accumulate"):
        with torch.inference_mode(), matmul(kind):
            logits.append(quarter(torch.tensor([[2, 651, 6037, 576]])).float())
    spread = logits[0].abs().max()
    assert 0 < (logits[0] - logits[1]).abs().max() < 2.0**-8 * spread


def test_a_models_linear_layers_are_computed_so(model: Gemma) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    layer = model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.inference_mode(), matmul("float32-accumulate"):
        model(torch.tensor([[2, 70, 71, 72, 73]]))
    handle.remove()
    ((x, output),) = seen
    exact = (x.double() @ layer.weight.double().T).numpy()
    bound = 97 * 2.0**-24 * (x.double().abs() @ layer.weight.double().abs().T).numpy()
    found = output.double().numpy()
    assert (rounded(exact - bound, model.dtype) <= found).all()
    assert (found <= rounded(exact + bound, model.dtype)).all()


def test_what_is_preferred_is_wider_only_for_16_bits_on_a_cpu() -> None:
    assert {(dtype, device): preferred_matmul(dtype, device) for dtype, device in [
        ("float16", "cpu"), ("bfloat16", "cpu"), ("float32", "cpu"), ("float64", "cpu"),
        ("float16", "cuda"), ("bfloat16", "cuda"), ("float32", "cuda"),
    ]} == {
        ("float16", "cpu"): "float32-accumulate", ("bfloat16", "cpu"): "float32-accumulate",
        ("float32", "cpu"): "native", ("float64", "cpu"): "native",
        ("float16", "cuda"): "native", ("bfloat16", "cuda"): "native", ("float32", "cuda"): "native",
    }  # fmt: skip


def test_an_unknown_kind_is_told_the_known_ones() -> None:
    for kind in ("fast", "float16-accumulate", "float16-accumulate:0", "float16-accumulate:-4"):
        with pytest.raises(MisuseError, match=f"{kind!r}; choose one of: native, float32-accumulate"), matmul(kind):
            pass


def stepwise(left: Tensor, right: Tensor, terms: int) -> Floats:
    """One element at a time: products and the sum of K of them exact in float64, then rounded to float16."""
    result = np.zeros((left.shape[0], right.shape[1]))
    for start in range(0, left.shape[1], terms):
        part = left[:, start : start + terms].double() @ right[start : start + terms].double()
        with np.errstate(invalid="ignore"):
            result = rounded(result + part.float().double().numpy(), torch.float16)
            result[result == 0] = 0.0
    return result


@pytest.mark.parametrize("terms", [1, 2, 7, 300, 1000])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_float16_sum_is_rounded_every_k_terms(name: str, terms: int) -> None:
    product, shapes, _ = PRODUCTS[name]
    # Small whole numbers: every product and every sum of K terms is exact in float32, so the order is all there is.
    operands = [(drawn(*shape, dtype=torch.float32, seed=seed) * 3).round().half() for seed, shape in enumerate(shapes)]
    with torch.inference_mode(), matmul(f"float16-accumulate:{terms}"):
        found = product(*operands)
    assert found.dtype == torch.float16
    assert torch.equal(found.double(), product(*(operand.double() for operand in operands)))
    fractions = [drawn(7, 300, dtype=torch.float16), drawn(300, 9, dtype=torch.float16, seed=1)]
    with torch.inference_mode(), matmul(f"float16-accumulate:{terms}"):
        found = fractions[0] @ fractions[1]
    if terms == 1:  # a product of two is exact, so there is one rounding a term and no order but the given one
        assert (found.double().numpy() == stepwise(fractions[0], fractions[1], terms)).all()
    with torch.inference_mode(), matmul("float32-accumulate"):
        wide = fractions[0] @ fractions[1]
    assert (terms >= 300) == torch.equal(found, wide)


def test_a_partial_sum_past_float16_is_lost_although_the_result_would_fit() -> None:
    row = torch.tensor([[60_000.0, 60_000.0, -60_000.0, -30_000.0]], dtype=torch.float16)
    ones = torch.ones(4, 1, dtype=torch.float16)
    results = {}
    for kind in ("float16-accumulate:1", "float16-accumulate:2", "float16-accumulate:4", "float32-accumulate"):
        with torch.inference_mode(), matmul(kind):
            results[kind] = (row @ ones).item()
    assert results == {
        "float16-accumulate:1": math.inf,
        "float16-accumulate:2": math.inf,
        "float16-accumulate:4": 30_000.0,
        "float32-accumulate": 30_000.0,
    }


def test_bfloat16_is_never_summed_in_float16() -> None:
    a, b = drawn(5, 300, dtype=torch.bfloat16), drawn(300, 4, dtype=torch.bfloat16, seed=1)
    with matmul("float32-accumulate"):
        wide = a @ b
    with matmul("float16-accumulate:8"):
        assert torch.equal(a @ b, wide)
