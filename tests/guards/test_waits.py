"""A device is waited for once a step: there is none here, so the CPU is made to look like one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder.test_pending import Late, NoWaits
from torch import Tensor
from transformers import DynamicCache, StaticCache

import stabilitykit as sk
from stabilitykit.guards import guard as guards
from stabilitykit.guards import watch as watching
from stabilitykit.models.gemma import KVCache

Make = Callable[..., Any]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each wait: how many numbers crossed."""
    counted: list[int] = []

    class Counted(Late):
        def wait(self) -> Any:
            counted.append(self.numbers.numel())
            with torch._C.DisableTorchFunction():
                return super().wait()

    monkeypatch.setattr(watching, "transfer", Counted)
    monkeypatch.setattr(guards, "transfer", Counted)
    return counted


class Waits(NoWaits):
    """Counts whatever would wait for a device; the kit's embedding asks one number of the host's own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except AssertionError as waits:
            self.found.append(str(waits))
            return func(*args, **(kwargs or {}))


def cache_of(model: Any, kind: str) -> dict[str, Any]:
    if kind == "kit":
        return {"cache": KVCache(model.config, batch=2, length=8, dtype=model.dtype)}
    if kind == "dynamic":
        return {"past_key_values": DynamicCache(config=model.config)}
    return {"past_key_values": StaticCache(config=model.config, max_cache_len=8)}


def steps(model: Any, kind: str) -> list[str]:
    """What waits in a prompt and two steps."""
    tokens = torch.randint(262, 360, (2, 6), generator=torch.Generator().manual_seed(0))
    given = cache_of(model, kind)
    with torch.no_grad(), Waits() as waits:
        for new in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
            model(new, **given)
    return waits.found


@pytest.mark.parametrize("watch", ["logits", "residual"])
@pytest.mark.parametrize("kind", ["kit", "dynamic", "static"])
def test_one_wait_a_step(own: Make, theirs: Make, waits: list[int], watch: Any, kind: str) -> None:
    model = own(planted=False) if kind == "kit" else theirs(planted=False)
    bare = steps(model, kind)
    with sk.guard(model, watch=watch, headroom=1.0):
        assert steps(model, kind) == bare
    assert waits == [2 * (2 if watch == "logits" else 5)] * 3


def test_what_a_processor_left_crosses_with_the_next_step(theirs: Make, ids: Tensor, waits: list[int]) -> None:
    model = theirs(planted=False)
    with sk.guard(model) as guard:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=5, max_new_tokens=4, min_new_tokens=4
        )
        assert waits == [6, 9, 9, 9]
        assert guard.breaks == []  # which asks for the last of them
    assert waits == [6, 9, 9, 9, 3]
