"""What must not be called a break, what must not be missed, and what recording must not touch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from stabilitykit.models.gemma import Gemma
from stabilitykit.recorder import record
from stabilitykit.records import Recording

Small = Callable[..., Gemma]


class Calls(nn.Module):
    """A module that runs a function."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.function(*inputs)


def run(function: Callable[..., object], *inputs: torch.Tensor) -> Recording:
    model = Calls(function)
    with torch.no_grad(), record(model) as recording:
        model(*inputs)
    return recording


HALF = torch.tensor([[[1.0, 5.0, 3.0, 2.0]]], dtype=torch.float16)


@pytest.mark.parametrize(
    "healthy",
    [
        lambda x: x.masked_fill(x < 2.5, -math.inf).sort().values / 0.7,
        lambda x: x.masked_fill(x < 2.5, -math.inf).flip(-1) / 2,
        lambda x: torch.log_softmax(x.masked_fill(x < 2.5, -math.inf), -1),
        lambda x: torch.cat([x.masked_fill(x < 2.5, -math.inf), x], -1) - 1,
        lambda x: x.masked_fill(x < 2.5, -math.inf).mT * 2,
    ],
)
def test_a_filter_stays_a_filter_when_its_elements_move(healthy: Callable[..., object]) -> None:
    assert run(healthy, HALF).first_break() is None


def test_softmax_of_sorted_filtered_logits_looks_at_what_is_left() -> None:
    recording = run(lambda x: torch.softmax(x.masked_fill(x < 2.5, -math.inf).sort().values, -1), HALF)
    found = next(r.softmax for r in recording if r.softmax is not None)
    assert (found.max_logit, found.logit_range) == (5.0, 2.0)


def test_a_mask_may_be_a_buffer() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Buffer(torch.full((4, 4), -math.inf).triu(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x.mT @ x + self.mask, -1)

    model = Masked()
    with torch.no_grad(), record(model) as recording:
        model(HALF.float())
    assert recording.first_break() is None
    assert recording.at("/add.0").masked == 6


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_large_negative_input_is_no_mask(sign: float) -> None:
    first = run(lambda x: x * 1.0 + sign * 13376.0, torch.full((1, 2, 3), sign * 55008.0).half()).first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.operator, first.broke.kind, first.broke.value) == ("add", "overflow", sign * 68384.0)


def test_a_scatter_that_adds_is_judged_by_what_was_there_before() -> None:
    def add_up(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(3, 4, dtype=x.dtype).index_add_(0, torch.tensor([0, 0, 1]), x)

    first = run(add_up, torch.full((3, 4), 60000.0).half()).first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.operator, first.broke.kind, first.broke.value) == ("index_add", "overflow", 120000.0)


def test_random_numbers_are_the_users_own() -> None:
    def draw(x: torch.Tensor) -> torch.Tensor:
        return torch.normal(x, 60000.0)

    x = torch.full((1, 2, 64), 60000.0).half()
    torch.manual_seed(0)
    draw(x)
    expected = torch.rand(1)
    torch.manual_seed(0)
    recording = run(draw, x)
    assert any(record.lost for record in recording)
    assert torch.equal(torch.rand(1), expected)


def test_prompts_of_their_own_keep_their_tokens_and_batches_may_shrink(small: Small) -> None:
    model = small(3, "float16")
    model.embed_tokens.weight.data[73, 5] = 60000.0
    with torch.no_grad(), record(model) as recording:
        model(torch.tensor([[2, 70, 71], [2, 70, 71], [2, 70, 72]]))
        model(torch.tensor([[2, 73, 75], [2, 70, 74]]))
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    assert (first.step, first.broke.row, first.broke.position, first.broke.token) == (1, 0, 1, 73)
    assert recording.at("embed_tokens", step=0).amax_token in (2, 70, 71, 72)


def test_one_recording_inside_another_sees_no_measuring(small: Small, tokens: torch.Tensor) -> None:
    model = small(3)
    with torch.no_grad(), record(model) as alone:
        model(tokens)
    other = small(3)
    with torch.no_grad(), record(model) as outer, record(other) as inner:
        model(tokens)
        other(tokens)
    sites = [r.site for r in alone]
    assert [r.site for r in outer if r.module != "outside"] == sites
    assert [r.site for r in inner if r.module != "outside"] == sites
    assert len(outer) == len(inner) == 2 * len(alone)  # each sees the other's operators


def test_a_users_hook_that_raises_before_ours_leaves_the_recorder_standing(small: Small, tokens: torch.Tensor) -> None:
    model = small(3)

    def refuse(module: nn.Module, args: object) -> None:
        raise PermissionError("not today")

    handle = model.register_forward_pre_hook(refuse)
    with torch.no_grad(), record(model) as recording:
        with pytest.raises(PermissionError):
            model(tokens)
        handle.remove()
        model(tokens) * 2.0
    assert recording.records[-1].site == "outside/mul.0"


def test_sparse_tensors_have_no_record_and_empty_ones_have_one() -> None:
    def unusual(x: torch.Tensor) -> object:
        sparse = x[0].float().to_sparse() * 2
        return sparse.to_dense(), torch.tensor(1.0) * x.sum(), torch.softmax(x[..., :0], -1)

    recorded = [(record.site, record.shape, record.amax) for record in run(unusual, HALF)]
    assert recorded == [
        ("/sum.0", (), 11.0),
        ("/mul.0", (), 11.0),
        ("/softmax.0", (1, 1, 0), None),
        ("/output", (1, 4), 10.0),
    ]
