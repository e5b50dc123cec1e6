"""Stress: the same program run upwards. A model scaled until a format overflows, which is the same in float32."""

import math
from dataclasses import replace
from functools import lru_cache

import torch

from stabilitykit.checkpoints import GemmaConfig
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import Gemma
from stabilitykit.records.scaling import Scaling
from stabilitykit.scaling.blueprint import Blueprint
from stabilitykit.scaling.program import UnsolvableError, cheapest_to_give_up, solve
from stabilitykit.scaling.subjects import continued
from stabilitykit.scaling.trace import Graph, trace

LARGEST_EXPONENT = 24


def check_gamma(gamma: float) -> int:
    """The exponent of γ. Raises MisuseError unless it is a power of two from 2^-24 to 2^24."""
    significand, exponent = math.frexp(gamma)
    if significand != 0.5 or abs(exponent - 1) > LARGEST_EXPONENT:
        raise MisuseError(
            f"A rescale γ is a power of two from 2^-{LARGEST_EXPONENT} to 2^{LARGEST_EXPONENT}, so that scaling by "
            f"it rounds nothing; {gamma} is not. Try 0.125, 4 or 16384."
        )
    return exponent - 1


def stress(graph: Graph, gamma: float) -> Scaling:
    """Everything scaled with what the model writes first, which is multiplied by γ: an embedding's rows, or what the
    first projection makes.

    Raises MisuseError for a γ that is no power of two from 2^-24 to 2^24, and where nothing else can make up for it,
    with what stands in the way.
    """
    exponent = check_gamma(gamma)
    if exponent == 0:
        return Scaling()
    fixed = {graph.first: exponent}
    try:
        return solve(graph, {}, {}, fixed=fixed, limited=False).scaling
    except UnsolvableError:
        ways = cheapest_to_give_up(graph, {}, margin=0.0, fixed=fixed)
        raise MisuseError(
            f"No exact scaling multiplies {graph.first} by {gamma:g}: "
            f"{'; '.join(f'at {one.site}, {one.why}' for one in ways[:3])}."
        ) from None


def stress_of_gemma(config: GemmaConfig, gamma: float) -> Scaling:
    """`stress` of the kit's own Gemma, whose sizes do not matter: what is traced is as small as can be."""
    if check_gamma(gamma) == 0:
        return Scaling()
    twin = replace(config, hidden_size=16, feed_forward=16, heads=2, kv_heads=1, head_dim=8, vocabulary=32)
    return _of_twin(twin, gamma)


@lru_cache(maxsize=64)
def _of_twin(twin: GemmaConfig, gamma: float) -> Scaling:
    return stress(_graph(twin), gamma)


@lru_cache(maxsize=16)
def _graph(twin: GemmaConfig) -> Graph:
    with torch.random.fork_rng(devices=[]):
        model = Gemma(twin).to(torch.bfloat16).eval()
    ids = torch.arange(3, 9)[None]
    eps = Blueprint(settings={"rms_eps": twin.rms_eps}, build=lambda changed: Gemma(replace(twin, **changed)))
    return trace(model, continued({"input_ids": ids}, steps=0), eps)  # its other settings stay as they are
