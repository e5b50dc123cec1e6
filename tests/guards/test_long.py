"""Many guarded steps: memory stays flat, every logit keeps its bits, and no hook is left."""

import ctypes
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import LARGE, hooks
from transformers import DynamicCache

import stabilitykit as sk

Make = Callable[..., Any]


def resident() -> int:
    """Bytes of memory that the process holds, without what is free and could be given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=pytest.mark.table)])
def test_memory_is_flat_and_logits_keep_their_bits(theirs: Make, steps: int) -> None:
    """Sequences of 50 tokens, one after the other, every fourth of which breaks in the middle."""
    model = theirs()
    drawn = torch.randint(262, 360, (steps, 2, 1), generator=torch.Generator().manual_seed(0))
    drawn[25::200, 1] = LARGE
    caches: list[Any] = []
    held = 0
    with torch.no_grad(), sk.guard(model, watch="residual") as guard:
        for at in range(steps):
            if at % 50 == 0:
                cache, bare = DynamicCache(config=model.config), DynamicCache(config=model.config)
                caches.append(weakref.ref(cache))
            found = model(drawn[at], past_key_values=cache).logits
            guard._thread.off = True  # the same step, unwatched
            expected = model(drawn[at], past_key_values=bare).logits
            guard._thread.off = False
            assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), at
            if at == 1000:
                held = resident()
        assert len(guard._sequences._of) <= 2
    assert [(one.row, one.step) for one in guard.breaks] == [(1, 25)] * (steps // 200)
    del cache, bare
    gc.collect()
    assert all(one() is None for one in caches)
    assert hooks(model) == 0
    if held:
        assert resident() - held < 2**24
