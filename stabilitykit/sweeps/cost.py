"""What the cases of a plan will cost in time and memory, before any of them runs.

Time is work divided by speed. The work is counted from the config: floating-point operations of the products, and
elements that are recorded. The speeds are measured here and now, in a second or two. Expect the right order of
magnitude, not the right digit: a range of lengths that breaks needs passes that nobody can foresee.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from stabilitykit.checkpoints.config import GemmaConfig
from stabilitykit.models.gemma.footprint import footprint
from stabilitykit.models.gemma.query_blocks import query_blocks
from stabilitykit.models.matmul import matmul, preferred_matmul
from stabilitykit.recorder.statistics import measure
from stabilitykit.records.sweep import Case
from stabilitykit.sweeps.axes import is_range

_SECONDS = 0.1  # for which each speed is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """`seconds` of computing, without reading the checkpoint; `memory` in bytes of weights and activations."""

    seconds: float
    memory: int


def cost(case: Case, config: GemmaConfig) -> Cost | None:
    """None for a case that only computes, or whose speed is that of starting a process."""
    if case.kind not in ("run", "lengths"):
        return None
    settings = case.settings
    length, dtype, device = int(settings["tokens"]), str(settings["dtype"]), str(settings["device"])
    kind = preferred_matmul(dtype, device) if settings["matmul"] == "auto" else settings["matmul"]
    needs = footprint(config, dtype, length, matmul=kind, device=device)
    passes = [length]
    if is_range(settings["length"]):
        passes = sorted({length, *settings["checks"]})
    rate = _products_a_second(dtype, device, kind)
    recording = _elements_a_second(dtype, device)
    seconds = sum(
        _operations(config, n, every_logit=case.kind == "run") / rate + _elements(config, n) / recording for n in passes
    )
    return Cost(seconds=seconds, memory=needs.weights + needs.activations)


def _operations(config: GemmaConfig, length: int, *, every_logit: bool) -> float:
    """Multiplications and additions of one forward pass."""
    heads = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    weights = config.layers * config.hidden_size * (heads + 3 * config.feed_forward)
    attention = 2 * config.head_dim * _scores(config, length)
    head = config.hidden_size * config.vocabulary * (length if every_logit else 1)
    return 2 * (length * weights + attention + head)


def _elements(config: GemmaConfig, length: int) -> float:
    """Elements that one forward pass stores, counted from `gemma/model.py`'s operators."""
    a_layer = 30 * config.hidden_size + 12 * config.heads * config.head_dim + 5 * config.feed_forward
    return config.layers * length * a_layer + 4 * _scores(config, length)


def _scores(config: GemmaConfig, length: int) -> int:
    """Attention scores that one forward pass computes."""
    computed = 0
    for index in range(config.layers):
        window = None if config.is_global(index) else config.window
        blocks = query_blocks(config.heads, length, length, window)
        computed += config.heads * (sum(block.scores for block in blocks) or length**2)
    return computed


@cache
def _products_a_second(dtype: str, device: str, kind: str) -> float:
    left, right = (torch.ones(512, 512, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    with torch.inference_mode(), matmul(kind):
        return 2 * 512**3 / _seconds(lambda: left @ right, device)


@cache
def _elements_a_second(dtype: str, device: str) -> float:
    values = torch.ones(1, 512, 1024, dtype=getattr(torch, dtype), device=device)
    with torch.inference_mode():
        return values.numel() / _seconds(lambda: measure(values, ()), device)


def _seconds(work: Callable[[], object], device: str) -> float:
    """The median time of one call."""
    work()
    taken: list[float] = []
    while sum(taken) < _SECONDS or len(taken) < 3:
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]
