"""An overflow that ends on the way leaves finite, wrong logits: it is seen where the residual stream is watched."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        h = 100 / (1 + h.abs())  # of an infinity, 0
        return h + self.up(h)


class CapNorm(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(h / 30)


class Inverse(nn.Module):
    """A decoder in which every layer begins with a quotient, which hides infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = CapNorm()
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        found: Tensor = self.head(self.norm(h))
        return found


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = Inverse().half().requires_grad_(False)
    made.embed.weight.fill_(9.0)
    made.embed.weight[5] = 0.0
    made.layers[0].up.weight.fill_(100.0)  # 8 · 100 · 100 of that token, 8 · 10 · 100 of the others
    return made


def test_it_is_reported_and_the_row_goes_on(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokens = torch.tensor([[1, 2, 3], [1, 5, 3]])
    bare = model(tokens)
    assert bare.isfinite().all()
    hidden = model.layers[0](model.embed(tokens))
    assert hidden.isfinite().flatten(1).all(1).tolist() == [True, False]
    with caplog.at_level(logging.WARNING), sk.guard(model, "raise", watch="residual") as guard:
        assert torch.equal(model(tokens), bare)
    (broke,) = guard.breaks
    assert (broke.row, broke.position, broke.token, broke.seen, broke.absorbed) == (1, 1, 5, "residual", True)
    assert (broke.layer, broke.kind, broke.did, broke.harmless) == (0, "overflow", "reported", False)
    assert "absorbed" in [link.event for link in broke.chain]
    assert [one.levelno for one in caplog.records] == [logging.WARNING]


def test_without_the_residual_nothing_is_seen(model: Any) -> None:
    with sk.guard(model) as guard:
        model(torch.tensor([[1, 5, 3]]))
    assert guard.breaks == []
