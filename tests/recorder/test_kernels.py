"""Every kernel writes the same row: counts and peaks to the last one, sums as closely as their order allows.

Triton's run on a GPU where there is one, else in Triton's interpreter, which is slow: fewer and smaller tensors then.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import overload

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stabilitykit.formats import FORMATS
from stabilitykit.recorder.kernels import cpu, cpu_softmax, device, machine, plain, plain_softmax, softmax_layout
from stabilitykit.recorder.kernels.layout import Field, edges
from stabilitykit.recorder.statistics import decode

KNOWN = tuple(FORMATS)
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
INTEGERS[torch.float64] = torch.int64
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 65504.0, -65520.0, 2.0**-25, 2.0**-149, 464.0, 1e300, 5e-324]


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES, ELEMENTS = (200, 200_000) if DEVICE == "cuda" else (20, 5_000)


@pytest.fixture(scope="module")
def cuda() -> Iterator[ModuleType]:
    pytest.importorskip("triton", reason="needs Triton")
    from stabilitykit.recorder.kernels import cuda

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":  # as many programs for small tensors as others have for large ones
            patch.setattr(cuda, "_BLOCKS", 1)
            patch.setattr(cuda, "_COLUMNS", 512)
        yield cuda


@pytest.fixture(scope="module")
def cuda_softmax() -> Iterator[ModuleType]:
    pytest.importorskip("triton", reason="needs Triton")
    from stabilitykit.recorder.kernels import cuda_softmax

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(cuda_softmax, "_TILES", 1)
        yield cuda_softmax


@contextmanager
def no_wait() -> Iterator[None]:
    """Torch raises where something waits for the device. The interpreter, which is numpy, may overflow in silence."""
    before = torch.cuda.get_sync_debug_mode() if DEVICE == "cuda" else 0
    try:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        with np.errstate(all="ignore"):
            yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode(before)


@overload
def on_device(tensor: Tensor) -> Tensor: ...
@overload
def on_device(tensor: None) -> None: ...
def on_device(tensor: Tensor | None) -> Tensor | None:
    """The same values with the same strides; `Tensor.cuda` would make some dense."""
    if tensor is None or DEVICE == "cpu":
        return tensor
    held = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0).to(DEVICE)
    return held.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check_rows_agree(tensor: Tensor, hidden: Tensor | None = None, limit: float = math.inf) -> None:
    against = edges(tensor.dtype, KNOWN)
    first, second = cpu.tally(tensor, against, hidden, limit), plain.tally(tensor, against, hidden, limit).numpy()
    check_equal(first, second)


def check_triton_agrees(
    cuda: ModuleType, tensor: Tensor, hidden: Tensor | None = None, limit: float = math.inf
) -> np.ndarray:
    against = edges(tensor.dtype, KNOWN)
    there, hidden_there = on_device(tensor), on_device(hidden)
    with no_wait():
        row = cuda.tally(there, against, hidden_there, limit)
        again = cuda.tally(there, against, hidden_there, limit)
        other = plain.tally(there, against, hidden_there, limit)
    assert row.device == there.device
    assert torch.equal(row.view(torch.int64), again.view(torch.int64))
    check_equal(cpu.tally(tensor, against, hidden, limit), row.cpu().numpy())
    check_equal(other.cpu().numpy(), row.cpu().numpy())
    return row.cpu().numpy()


def check_equal(first: np.ndarray, second: np.ndarray) -> None:
    exact = [i for i in range(len(first)) if i not in (Field.SUM, Field.SQUARES, Field.SCALE, Field.SHRUNK)]
    np.testing.assert_array_equal(first[exact], second[exact])
    (one, scale), (other, scale_too) = (row[[Field.SQUARES, Field.SCALE]].tolist() for row in (first, second))
    assert math.sqrt(one) * scale == pytest.approx(math.sqrt(other) * scale_too, rel=1e-12, abs=1e-320)
    magnitude = max(abs(first[Field.MINIMUM]), abs(first[Field.MAXIMUM]))
    if math.isfinite(magnitude) and math.isfinite(first[Field.SUM]):
        assert abs(first[Field.SUM] - second[Field.SUM]) <= 1e-7 * magnitude
    if math.isfinite(magnitude) and not (math.isfinite(first[Field.SUM]) and math.isfinite(second[Field.SUM])):
        assert abs(first[Field.SHRUNK] - second[Field.SHRUNK]) <= 1e-7 * magnitude


def drawn(draw: Callable[..., int], dtype: torch.dtype, elements: int, seed: int) -> Tensor:
    """Random bits, numbers of a model's size and special values, mixed in proportions of their own."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.iinfo(INTEGERS[dtype]).bits
    words = torch.randint(-(2**63), 2**63 - 1, (elements,), generator=generator)
    bits = (words >> (64 - width)).to(INTEGERS[dtype]).view(dtype)
    usual = (torch.randn(elements, generator=generator) * 10.0 ** draw(st.integers(-6, 6))).to(dtype)
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)[
        torch.randint(0, len(SPECIAL), (elements,), generator=generator)
    ]
    kind = torch.rand(elements, generator=generator)
    rare = 10.0 ** -draw(st.integers(0, 4))
    return torch.where(kind < rare, torch.where(kind < rare / 2, bits, special), usual)


def drawn_with_mask(
    data: st.DataObject, dtype: torch.dtype, seed: int, most: int
) -> tuple[Tensor, Tensor | None, float]:
    """A tensor of any shape and strides, and perhaps what of it is hidden up to which value."""
    shape = data.draw(st.lists(st.integers(0, 9), max_size=6))
    shape[-1:] = [data.draw(st.sampled_from([1, 3, 31, 257, 5000]))]
    while math.prod(shape) > most:
        shape.pop(0)
    tensor = drawn(data.draw, dtype, math.prod(shape), seed).reshape(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    if tensor.ndim and data.draw(st.booleans()):
        tensor = tensor[..., :: data.draw(st.integers(1, 3))]
    hidden, limit = None, math.inf
    if data.draw(st.booleans()):
        rows = torch.rand(tensor.shape[-1:], generator=torch.Generator().manual_seed(seed)) < 0.3
        hidden = rows.expand(tensor.shape) if data.draw(st.booleans()) else rows.expand(tensor.shape).contiguous()
        limit = data.draw(st.sampled_from([math.inf, 0.0, -0.0, -1000.0, -1e300]))
    return tensor, hidden, limit


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(list(INTEGERS)), st.integers(0, 2**32))
def test_any_tensor(data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
    check_rows_agree(*drawn_with_mask(data, dtype, seed, 200_000))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data(), st.sampled_from(list(INTEGERS)), st.integers(0, 2**32))
def test_any_tensor_in_triton(cuda: ModuleType, data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
    check_triton_agrees(cuda, *drawn_with_mask(data, dtype, seed, ELEMENTS))


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
def test_triton_finds_the_first_of_equal_peaks_in_any_program(cuda: ModuleType, dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 1_603, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0, 1_601] = tensor[1, 7] = tensor[2, 5] = -30_000.0
    tensor[1, 100:200] = math.nan
    assert check_triton_agrees(cuda, tensor)[Field.INDEX] == 1_601
    assert check_triton_agrees(cuda, tensor.T)[Field.INDEX] == 5 * 3 + 2
    assert check_triton_agrees(cuda, tensor[:, :1_600])[Field.INDEX] == 1_607


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
@pytest.mark.parametrize("limit", [math.inf, 1.0, -0.0, 0.0, -1.0, -math.inf])
def test_triton_hides_what_is_not_above_the_limit(cuda: ModuleType, dtype: torch.dtype, limit: float) -> None:
    """NaN of either sign is never hidden, and both zeros are equal."""
    magnitudes = torch.tensor([math.nan, math.inf, 0.0, 1.0, 1.5, 2.0**-16], dtype=dtype)
    tensor = torch.cat([magnitudes.copysign(torch.tensor(sign, dtype=dtype)) for sign in (1.0, -1.0)])
    check_triton_agrees(cuda, tensor, torch.ones_like(tensor, dtype=torch.bool), limit)


def test_triton_walks_with_wide_indices(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in tensors with more than 2^30 elements."""
    monkeypatch.setattr(device, "_LARGE", 0)
    tensor = torch.randn(2, 3, 4, 5, 60, generator=torch.Generator().manual_seed(0)).permute(1, 0, 3, 4, 2)
    hidden = (torch.arange(60) < 9)[:, None].expand(tensor.shape)
    check_triton_agrees(cuda, tensor, hidden, 0.5)
    check_triton_agrees(cuda, tensor.contiguous())


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, math.nan, -math.inf, -1.5])
def test_one_value_throughout_in_triton(cuda: ModuleType, dtype: torch.dtype, value: float) -> None:
    tensor = torch.full((1_100,), value, dtype=dtype)
    check_triton_agrees(cuda, tensor)
    row = check_triton_agrees(cuda, tensor, torch.ones(1_100, dtype=torch.bool))
    assert row[Field.MASKED] + row[Field.NAN] == 1_100
    assert row[Field.AMAX] == -1


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
def test_triton_counts_from_each_code_on_and_each_exponent(cuda: ModuleType, dtype: torch.dtype) -> None:
    """The numbers next to each edge and each power of two, on either side: an edge off by one changes a count."""
    against = edges(dtype, KNOWN)
    powers = 2.0 ** np.arange(against.lowest, against.lowest + against.bins, dtype=np.float64)
    integer = INTEGERS[against.wide]
    codes = torch.cat((torch.tensor(against.codes.tolist()), torch.tensor(powers).to(against.wide).view(integer)))
    near = torch.cat([codes + step for step in (-1, 0, 0, 1, 1, 1)]).clamp(min=0).to(integer).view(against.wide)
    check_triton_agrees(cuda, near.to(dtype))
    check_triton_agrees(cuda, -near.to(dtype))


@pytest.mark.parametrize("sizes", [(1e-320, 1e-170), (1e-170, 1.0), (1.0, 1e170), (1e-320, 1e170), (0.0, 1e-320)])
def test_triton_squares_float64_of_any_size(cuda: ModuleType, sizes: tuple[float, float]) -> None:
    """Whether they meet in one lane, in one block or only when programs' rows are merged."""
    small, large = (torch.full((600,), size, dtype=torch.float64) for size in sizes)
    for tensor in (torch.cat((small, large)), torch.stack((small, large), -1).reshape(-1), small):
        check_triton_agrees(cuda, tensor)


@pytest.mark.parametrize("pattern", [(1.7e308,), (1.7e308, -1.7e308), (1.7e308, 1e308, -1.0), (-1.7e308, 5e-324)])
def test_triton_sums_float64_whose_sum_overflows(cuda: ModuleType, pattern: tuple[float, ...]) -> None:
    """Among the lanes of a block, and where programs' rows are merged."""
    for repeats in (2, 1_300):
        tensor = torch.tensor(pattern, dtype=torch.float64).repeat(repeats)
        row = check_triton_agrees(cuda, tensor)
        mean = decode(row, edges(tensor.dtype, KNOWN), tensor.shape).mean
        assert mean == pytest.approx(sum(value / len(pattern) for value in pattern), rel=1e-12)


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
def test_many_threads_and_blocks_with_a_tie_for_the_peak(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 300_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0, 299_999] = tensor[1, 7] = tensor[2, 5] = 30_000.0
    tensor[1, 100_000:100_100] = math.nan
    check_rows_agree(tensor)
    assert cpu.tally(tensor, edges(dtype, ()))[Field.INDEX] == 299_999
    check_rows_agree(tensor.T)


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
@pytest.mark.parametrize("value", [0.0, math.nan, -math.inf, -1.5])
def test_one_value_throughout(dtype: torch.dtype, value: float) -> None:
    check_rows_agree(torch.full((70_000,), value, dtype=dtype))
    check_rows_agree(torch.full((70_000,), value, dtype=dtype), torch.ones(70_000, dtype=torch.bool))


def test_without_torchs_threads_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    shared = cpu.tally(tensor, edges(tensor.dtype, KNOWN))
    monkeypatch.setattr(machine, "_torch_threads", lambda: None)
    check_equal(cpu.tally(tensor, edges(tensor.dtype, KNOWN)), shared)


def test_fewer_threads_than_asked_for_do_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(700_000, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for started in (1, 2, 7):

        def start(kernel: machine.Compiled, arguments: int, *_: int, times: int = started) -> None:
            for _time in range(times):
                kernel(arguments)

        monkeypatch.setattr(machine, "_torch_threads", lambda start=start: start)
        check_rows_agree(tensor)


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("zeros", [(), (9_000,), (0,)])
def test_numbers_of_one_sign(dtype: torch.dtype, sign: int, zeros: tuple[int, ...]) -> None:
    tensor = sign * (torch.rand(10_001, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    tensor[list(zeros)] = 0.0
    check_rows_agree(tensor)
    check_rows_agree(tensor, torch.arange(10_001) % 3 == 0)
    tensor[1::3] = math.nan
    check_rows_agree(tensor)


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
def test_numbers_about_each_edge(dtype: torch.dtype) -> None:
    """Each edge is met in a block of its own, among numbers on either side of it."""
    against = edges(dtype, KNOWN)
    integers = INTEGERS[against.wide]
    codes = torch.from_numpy(against.codes).to(integers)
    tensor = torch.cat([(code + torch.arange(-2048, 2048, dtype=integers)).abs() for code in codes]).view(against.wide)
    check_rows_agree(tensor.to(dtype))
    check_rows_agree(torch.cat((tensor[:7], tensor[-7:])).to(dtype))


@pytest.mark.slow
def test_kernels_can_be_found_on_disk() -> None:
    for dtype in INTEGERS:
        check_rows_agree(torch.zeros(3, dtype=dtype))
        cpu_softmax.tally(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype) / 3, None, None)
    for kernel in machine._kept:  # numba names what it keeps by these, and functions are other ones in each process
        held = [cell.cell_contents for cell in kernel._pyfunc.__closure__]
        assert all(isinstance(value, (bool, int, np.generic, type)) for value in held), held


def check_equal_softmax(first: np.ndarray, second: np.ndarray) -> None:
    counted = [i for i in range(len(first)) if i < softmax_layout.FIELDS and i != softmax_layout.Field.SUM_ERROR]
    np.testing.assert_array_equal(first[counted], second[counted])
    np.testing.assert_array_equal(first[softmax_layout.FIELDS + 2 :: 3], second[softmax_layout.FIELDS + 2 :: 3])
    np.testing.assert_allclose(first, second, rtol=2e-5, atol=1e-6)


def check_triton_softmax_agrees(
    cuda_softmax: ModuleType, logits: Tensor, probabilities: Tensor, head: int | None, hidden: Tensor | None
) -> None:
    there = (on_device(logits), on_device(probabilities))
    hidden_there = on_device(hidden)
    with no_wait():
        row = cuda_softmax.tally(*there, head, hidden_there)
        again = cuda_softmax.tally(*there, head, hidden_there)
        other = plain_softmax.tally(*there, head, hidden_there) if logits.numel() else row
    assert row.device == there[0].device
    assert torch.equal(row.view(torch.int64), again.view(torch.int64))
    check_equal_softmax(cpu_softmax.tally(logits, probabilities, head, hidden), row.cpu().numpy())
    check_equal_softmax(other.cpu().numpy(), row.cpu().numpy())


def drawn_softmax(
    data: st.DataObject, dtype: torch.dtype, narrow: bool, seed: int
) -> tuple[Tensor, Tensor, int | None, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    rows, heads, queries, keys = (data.draw(st.integers(1, most)) for most in (2, 3, 9, 300))
    logits = torch.randn(rows, heads, queries, keys, generator=generator) * 10.0 ** data.draw(st.integers(-1, 2))
    hidden = None
    if data.draw(st.booleans()):
        hidden = (torch.rand(queries, keys, generator=generator) < 0.4).expand(logits.shape)
        hidden = hidden.contiguous() if data.draw(st.booleans()) else hidden
        logits = logits.masked_fill(hidden, torch.finfo(torch.float32).min)
    for value in (math.inf, -math.inf, math.nan):
        if data.draw(st.integers(0, 3)) == 0:
            logits.view(-1)[data.draw(st.integers(0, logits.numel() - 1))] = value
    wide = dtype if dtype == torch.float64 or not narrow else torch.float32
    probabilities = torch.softmax(logits.to(wide), -1).to(dtype)
    logits = logits.to(wide)
    if data.draw(st.booleans()):  # strides do not matter
        logits, probabilities = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (logits, probabilities))
    return logits, probabilities, data.draw(st.sampled_from([None, 1])), hidden


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(list(INTEGERS)), st.booleans(), st.integers(0, 2**32))
def test_any_softmax(data: st.DataObject, dtype: torch.dtype, narrow: bool, seed: int) -> None:
    drawn = drawn_softmax(data, dtype, narrow, seed)
    check_equal_softmax(cpu_softmax.tally(*drawn), plain_softmax.tally(*drawn).numpy())


@pytest.mark.slow
@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(st.data(), st.sampled_from(list(INTEGERS)), st.booleans(), st.integers(0, 2**32))
def test_any_softmax_in_triton(
    cuda_softmax: ModuleType, data: st.DataObject, dtype: torch.dtype, narrow: bool, seed: int
) -> None:
    check_triton_softmax_agrees(cuda_softmax, *drawn_softmax(data, dtype, narrow, seed))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (5,), (1, 1), (4, 1), (2, 33_000)])
def test_softmax_of_any_length_in_triton(cuda_softmax: ModuleType, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    probabilities = torch.softmax(logits, -1)
    check_triton_softmax_agrees(cuda_softmax, logits, probabilities, None, None)
    if len(shape) > 1:
        check_triton_softmax_agrees(cuda_softmax, logits, probabilities, 0, None)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (5,)])
def test_softmax_of_little(shape: tuple[int, ...]) -> None:
    found = cpu_softmax.tally(torch.zeros(shape), torch.softmax(torch.zeros(shape), -1), None, None)
    assert found[softmax_layout.Field.VISIBLE] == math.prod(shape)


@pytest.mark.slow
def test_triton_compiles_the_kernels_for_gpus(tmp_path: Path) -> None:
    """In a process of its own: this one may interpret them. Only ln may flush subnormals, of which it gets none."""
    pytest.importorskip("triton", reason="needs Triton")
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    flushing = {tuple(line.split()) for line in ran.stdout.splitlines()}
    assert flushing <= {("look", "fma.rn.ftz.f32"), ("look", "rcp.approx.ftz.f64")}
