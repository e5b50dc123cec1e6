"""Backward passes inside a recorded block are left alone, and what they leave is looked at."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from watched import Function, X, bits

from stabilitykit.recorder import record
from stabilitykit.records import Level


def overflowing_gradients() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).half()


def test_gradients_that_are_not_finite_are_one_break(level: Level) -> None:
    model = overflowing_gradients()
    model[2].weight.requires_grad_(False)
    with record(model, formats=(), level=level) as recording:
        loss = model(X.half()).float().square().sum()
        (loss * 1e9).backward()
        loss.item()
    found = [record for record in recording if record.broke is not None]
    assert [record.site for record in found] == ["backward/2.bias"]
    record_, broke = found[0], found[0].broke
    assert broke is not None
    assert (record_.module, record_.operator, broke.kind, broke.outside) == ("backward", None, "unresolved", "backward")
    lost = ~model[2].bias.grad.isfinite()
    assert (broke.count, record_.lost, record_.shape) == (int(lost.sum()), int(lost.sum()), (8,))
    assert broke.index == (int(lost.int().argmax()),)
    assert (broke.position, broke.row, broke.token, broke.value) == (None, None, None, None)
    assert broke.limit == 65504
    assert recording.first_break() is record_


def test_gradients_that_stay_lost_are_told_once_and_finite_ones_never() -> None:
    model = overflowing_gradients()
    with record(model, formats=()) as recording:
        for scale in (1.0, 1e9, 1e9):
            (model(X.half()).float().square().sum() * scale).backward()
    assert [record.site for record in recording if record.broke] == ["backward/2.bias"]


def test_operators_inside_a_backward_pass_are_not_recorded_and_those_around_it_are(level: Level) -> None:
    model = Function(lambda x: x.exp())
    with record(model, formats=(), level=level) as recording:
        model(X).sum().backward()
        model.inner.weight.detach() * 2.0
    with record(model, formats=(), level=level) as without:
        model(X).sum()
        model.inner.weight.detach() * 2.0
    assert [record.site for record in recording] == [record.site for record in without]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_modules_that_run_again_are_no_steps(reentrant: bool, level: Level) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    model = Checkpointed()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    expected = [bits(held.grad) for held in model.parameters()]
    model.zero_grad()
    with record(model, formats=(), level=level) as recording:
        model(x).sum().backward()
    assert [bits(held.grad) for held in model.parameters()] == expected
    assert recording.header.starts == (0,)
    assert len({record.site for record in recording}) == len(recording)


def test_autograd_is_as_it_was_afterwards() -> None:
    def engines() -> list[Any]:
        return [vars(holder)["_engine_run_backward"] for holder in (torch.autograd, torch.autograd.graph)]

    before = engines()
    outer, inner = nn.Linear(8, 8), nn.Linear(8, 8)
    with record(outer, formats=()):
        with record(inner, formats=()):
            assert engines() != before
            assert len(set(engines())) == 1
            inner(X)
        assert engines() != before
        outer(X)
    assert engines() == before


def test_a_users_mode_still_sees_a_backward_pass() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(block: Any) -> int:
        model = nn.Linear(8, 8)
        with FlopCounterMode(display=False) as counter, block(model):
            model(X).sum().backward()
        return counter.get_total_flops()

    assert flops(lambda model: record(model, formats=())) == flops(lambda model: torch.enable_grad()) > 0
