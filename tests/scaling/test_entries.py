"""The entries of the table are what they say: weights that every format holds, and something that float16 does not."""

from typing import Any

import pytest
import torch
from scaled.entry import Entry, Run, error, outputs
from scaled.table import ENTRIES
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stabilitykit.models.operators import OperatorMode, Traits

MASK = 1e30  # what is larger hides something


def stored(model: nn.Module, run: Run) -> float:
    """The peak of what a 16-bit run of the bfloat16 `model` stores, within 2^-8 of it."""
    found = [0.0]

    def note(kind: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = kind.func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and tensor.dtype == torch.bfloat16
                and tensor.numel()
                and "empty" not in kind.name
            ):
                sizes = tensor.abs()
                found.append(float(sizes.where(sizes < MASK, 0.0).max()))
        return result

    with torch.no_grad(), OperatorMode(note):
        run(model)
    return max(found)


@pytest.mark.table
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=str)
def test_float16_breaks_an_entry_as_planted(entry: Entry) -> None:
    model = entry.model()
    for parameter in model.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())
        assert float(parameter.abs().max()) <= torch.finfo(torch.float16).max
    expected = outputs(model, entry.run)
    assert all(tensor.isfinite().all() for tensor in expected)
    peak = stored(entry.model().bfloat16(), entry.run)
    assert 67_000 < peak < 1_000_000
    half, usual = (
        error(outputs(entry.model().to(dtype), entry.run), expected) for dtype in (torch.float16, torch.bfloat16)
    )
    assert not half <= 10 * usual  # NaN, or what a clamp leaves
    assert usual <= 2.0 or entry.name == "Gemma 3n"


@pytest.mark.table
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=str)
def test_an_entry_runs_on_what_is_unseen(entry: Entry) -> None:
    model = entry.model()
    for attention in entry.attentions:
        again = entry.same(model, attention=attention)
        assert all(tensor.isfinite().all() for tensor in outputs(again, *entry.unseen.values()))
    with torch.device("meta"):  # what settings do is read off a model without weights
        assert {p.device.type for p in entry.build().parameters()} == {"meta"}
