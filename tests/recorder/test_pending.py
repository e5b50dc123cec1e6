"""What a device computes is looked at when it has crossed to the host, and says then what it would have said at once.

There is no device here but the CPU, so it is made to look like one: rows are torch's tensors, which cross only when
somebody waits for them, and nothing can be looked at in between.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stabilitykit.models.gemma import Gemma, KVCache
from stabilitykit.recorder import Statistic, custom, observe, origins, pending, record, session, softmax
from stabilitykit.recorder.kernels import plain, plain_softmax
from stabilitykit.recorder.pending import Pending
from stabilitykit.records import Record, Recording

Small = Callable[..., Gemma]
BREAKS_FLOAT16 = 2.0**15


class Late:
    """Numbers that never arrive by themselves."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def arrived(self) -> bool:
        return False

    def wait(self) -> Any:
        return self.numbers.numpy()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (custom, observe, origins, session):
        monkeypatch.setattr(module, "is_here", lambda tensor: False)
    monkeypatch.setattr(observe, "tally", plain.tally)
    monkeypatch.setattr(softmax, "_tally", plain_softmax.tally)
    monkeypatch.setattr(pending, "transfer", Late)


class NoWaits(TorchFunctionMode):
    """Refuses whatever would wait for a device."""

    WAITS = frozenset(
        "item tolist numpy cpu nonzero masked_select unique equal allclose __bool__ __int__ __float__ __index__".split()
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        chooses = name == "__getitem__" and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else [args[1]])
        )
        if name in self.WAITS or chooses:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waits(layers: nn.ModuleList) -> Iterator[None]:
    """From the first layer to the last."""
    inside = ExitStack()

    def begin(*_: object) -> None:
        inside.enter_context(NoWaits())

    def end(*_: object) -> None:
        inside.close()

    hooks = [layers[0].register_forward_pre_hook(begin), layers[-1].register_forward_hook(end, always_call=True)]
    try:
        yield
    finally:
        inside.close()
        for hook in hooks:
            hook.remove()


def run(model: Gemma, **options: Any) -> Recording:
    """A prompt with padding, and two more tokens."""
    ids = torch.randint(262, 360, (2, 9), generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :3] = False
    cache = KVCache(model.config, batch=2, length=11, dtype=model.dtype)
    with torch.no_grad(), record(model, position_peaks=True, **options) as recording:
        for new in (ids, ids[:, :1], ids[:, 1:2]):
            logits = model(new, padding=real, cache=cache)
            real = torch.cat((real, real.new_ones(2, 1)), 1)
            if bool(logits.isfinite().all()):
                model.sampler(logits[:, -1], temperature=1.0, top_p=0.9, top_k=5, generator=torch.Generator())
    return recording


def compare(found: Record, expected: Record) -> None:
    """Every field; sums and softmax statistics to the digits on which all kernels agree."""
    one, other = dataclasses.asdict(found), dataclasses.asdict(expected)
    for name in ("mean", "rms"):
        near(one.pop(name), other.pop(name))
    softmax, expected_softmax = one.pop("softmax"), other.pop("softmax")
    assert (softmax is None) == (expected_softmax is None)
    for name in softmax or ():
        near(softmax[name], expected_softmax[name])
    texts = [repr(fields).replace("-0.0,", "0.0,") for fields in (one, other)]  # in which NaN equals NaN
    assert texts[0] == texts[1]


def near(found: Any, expected: Any) -> None:
    if expected is None:
        assert found is None
    else:
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-6, nan_ok=True)


@pytest.mark.table
@pytest.mark.parametrize("rescale", [1.0, BREAKS_FLOAT16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_a_recording_that_came_late_is_that_which_came_at_once(
    small: Small, request: pytest.FixtureRequest, generation: int, dtype: str, rescale: float
) -> None:
    model = small(generation, dtype, rescale)
    at_once = run(model)
    request.getfixturevalue("device")
    late = run(model)
    assert len(late) == len(at_once) > 300
    for found, expected in zip(late, at_once, strict=True):
        compare(found, expected)
    assert (late.first_break() is not None) == (dtype == "float16" and rescale == BREAKS_FLOAT16)


@pytest.mark.table
@pytest.mark.parametrize("generation", [1, 2, 3])
@pytest.mark.parametrize("level", ["operators", "modules", "layers"])
@pytest.mark.usefixtures("device")
def test_nothing_waits_from_the_first_layer_to_the_last(small: Small, generation: int, level: str) -> None:
    model = small(generation, "float16", BREAKS_FLOAT16)
    site = "layers.0" if level == "layers" else "layers.0.mlp.down_proj"
    run(model, level=level)  # what is looked up once on the host
    with no_waits(model.layers):
        recording = run(model, level=level, watch=[(site, 3)])
    assert recording.first_break() is not None
    assert len(recording.header.watched) == 3  # in each step


@pytest.mark.usefixtures("device")
def test_a_users_statistics_wait_for_nothing_and_are_there_in_the_end(small: Small) -> None:
    model = small(3, "float16", BREAKS_FLOAT16)
    peak = Statistic("peak", "magnitude", lambda x: x.abs().nan_to_num(0.0, math.inf).max())
    run(model, statistics=[peak])  # what is looked up once on the host
    with no_waits(model.layers):
        recording = run(model, statistics=[peak])
    assert recording.first_break() is not None
    seen = [made for made in recording if made.amax is not None]
    assert len(seen) > 300
    assert [made.extra["peak"] for made in seen] == [
        math.inf if made.positive_inf or made.negative_inf else made.amax for made in seen
    ]


def test_that_a_wait_would_be_seen(small: Small) -> None:
    model = small(3)
    model.layers[1].register_forward_hook(lambda module, args, output: bool(output.isfinite().all()) and None)
    with no_waits(model.layers), pytest.raises(AssertionError, match="waits for the device"):
        model(torch.tensor([[2, 3]]))


@pytest.mark.usefixtures("device")
def test_what_is_written_over_was_looked_at_before() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            big = x * 300.0
            y = big + 1.0
            big.zero_()
            return y

    model = Overwrites()
    with torch.no_grad(), record(model) as recording:
        model(torch.tensor([[300.0, 1.0]], dtype=torch.float16))
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.operator, first.broke.kind, first.broke.operands) == ("mul", "overflow", (300.0, 300.0))


def test_rows_are_used_in_order_and_tensors_kept_no_longer_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "transfer", Late)
    waiting = Pending()
    used: list[float] = []
    tensors = [torch.full((4,), float(i)) for i in range(3)]
    references = [weakref.ref(tensor) for tensor in tensors]
    for i, tensor in enumerate(tensors):
        waiting.after(torch.tensor([float(i)], dtype=torch.float64), lambda row: used.append(float(row[0])), [tensor])
        waiting.do(partial(used.append, i + 0.5))
    assert used == []
    waiting.settle()
    assert used == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert not waiting
    waiting.do(lambda: used.append(9.0))  # at once
    assert used[-1] == 9.0
    del tensors, tensor
    assert all(reference() is None for reference in references)


def test_when_too_much_is_kept_the_oldest_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "transfer", Late)
    monkeypatch.setattr(pending, "_HELD", 100)
    waiting = Pending()
    used: list[int] = []
    for i in range(5):
        waiting.after(torch.full((1,), i, dtype=torch.float64), lambda row: used.append(int(row[0])), [torch.zeros(10)])
    assert used  # 40 bytes each
    waiting.settle()
    assert used == [0, 1, 2, 3, 4]
