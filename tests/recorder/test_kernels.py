"""Every kernel writes the same row: counts and peaks to the last one, sums as closely as their order allows."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stabilitykit.recorder.kernels import cpu, cpu_softmax, machine, plain, plain_softmax, softmax_layout
from stabilitykit.recorder.kernels.layout import Field, edges

FORMATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
INTEGERS[torch.float64] = torch.int64
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 65504.0, -65520.0, 2.0**-25, 2.0**-149, 464.0, 1e300, 5e-324]


def check_rows_agree(tensor: Tensor, hidden: Tensor | None = None, limit: float = math.inf) -> None:
    against = edges(tensor.dtype, FORMATS)
    first, second = cpu.tally(tensor, against, hidden, limit), plain.tally(tensor, against, hidden, limit).numpy()
    if torch.cuda.is_available():
        from stabilitykit.recorder.kernels import cuda

        third = cuda.tally(tensor.cuda(), against, None if hidden is None else hidden.cuda(), limit).cpu().numpy()
        check_equal(first, third)
    check_equal(first, second)


def check_equal(first: np.ndarray, second: np.ndarray) -> None:
    exact = [i for i in range(len(first)) if i not in (Field.SUM, Field.SQUARES, Field.SCALE)]
    np.testing.assert_array_equal(first[exact], second[exact])
    (one, scale), (other, scale_too) = (row[[Field.SQUARES, Field.SCALE]].tolist() for row in (first, second))
    assert math.sqrt(one) * scale == pytest.approx(math.sqrt(other) * scale_too, rel=1e-12, abs=1e-320)
    magnitude = max(abs(first[Field.MINIMUM]), abs(first[Field.MAXIMUM]))
    if math.isfinite(magnitude) and math.isfinite(first[Field.SUM]):
        assert abs(first[Field.SUM] - second[Field.SUM]) <= 1e-7 * magnitude


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


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(list(INTEGERS)), st.integers(0, 2**32))
def test_any_tensor(data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
    shape = data.draw(st.lists(st.integers(0, 9), max_size=6))
    shape[-1:] = [data.draw(st.sampled_from([1, 3, 31, 257, 5000]))]
    while math.prod(shape) > 200_000:
        shape.pop(0)
    tensor = drawn(data.draw, dtype, math.prod(shape), seed).reshape(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    if tensor.ndim and data.draw(st.booleans()):
        tensor = tensor[..., :: data.draw(st.integers(1, 3))]
    hidden, limit = None, math.inf
    if data.draw(st.booleans()):
        rows = torch.rand(tensor.shape[-1:], generator=torch.Generator().manual_seed(seed)) < 0.3
        hidden = rows.expand(tensor.shape) if data.draw(st.booleans()) else rows.expand(tensor.shape).contiguous()
        limit = data.draw(st.sampled_from([math.inf, 0.0, -1000.0]))
    check_rows_agree(tensor, hidden, limit)


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
    shared = cpu.tally(tensor, edges(tensor.dtype, FORMATS))
    monkeypatch.setattr(machine, "_torch_threads", lambda: None)
    check_equal(cpu.tally(tensor, edges(tensor.dtype, FORMATS)), shared)


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
    against = edges(dtype, FORMATS)
    integers = INTEGERS[against.wide]
    codes = torch.from_numpy(against.codes).to(integers)
    tensor = torch.cat([(code + torch.arange(-2048, 2048, dtype=integers)).abs() for code in codes]).view(against.wide)
    check_rows_agree(tensor.to(dtype))
    check_rows_agree(torch.cat((tensor[:7], tensor[-7:])).to(dtype))


def test_kernels_can_be_found_on_disk() -> None:
    for dtype in INTEGERS:
        check_rows_agree(torch.zeros(3, dtype=dtype))
        check_softmax_agrees(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype) / 3, None, None)
    for kernel in machine._kept:  # numba names what it keeps by these, and functions are other ones in each process
        held = [cell.cell_contents for cell in kernel._pyfunc.__closure__]
        assert all(isinstance(value, (bool, int, np.generic, type)) for value in held), held


def check_softmax_agrees(logits: Tensor, probabilities: Tensor, head: int | None, hidden: Tensor | None) -> None:
    first = cpu_softmax.tally(logits, probabilities, head, hidden)
    second = plain_softmax.tally(logits, probabilities, head, hidden).numpy()
    counted = [i for i in range(len(first)) if i < softmax_layout.FIELDS and i != softmax_layout.Field.SUM_ERROR]
    np.testing.assert_array_equal(first[counted], second[counted])
    np.testing.assert_allclose(first, second, rtol=2e-5, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(list(INTEGERS)), st.booleans(), st.integers(0, 2**32))
def test_any_softmax(data: st.DataObject, dtype: torch.dtype, narrow: bool, seed: int) -> None:
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
    check_softmax_agrees(logits, probabilities, data.draw(st.sampled_from([None, 1])), hidden)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (5,)])
def test_softmax_of_little(shape: tuple[int, ...]) -> None:
    found = cpu_softmax.tally(torch.zeros(shape), torch.softmax(torch.zeros(shape), -1), None, None)
    assert found[softmax_layout.Field.VISIBLE] == math.prod(shape)
