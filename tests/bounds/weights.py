"""Small Gemmas with weights that no initialiser makes, and what their modules make of many hidden states."""

from dataclasses import replace

import torch
from remedied import SPECS, small

from stabilitykit.bounds.bound import bound_sites
from stabilitykit.bounds.hidden_states import States, confirm, confirm_head, states_of, stored_in
from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.random import random_checkpoint
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.recorder import record
from stabilitykit.records.bounds import Largest, SiteBound

SHAPES = (
    "layers=2&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&vocabulary=512",
    "layers=2&hidden_size=24&feed_forward=40&heads=2&kv_heads=1&head_dim=8&vocabulary=300&context=64",
)


def plain(generation: int, shape: str = "") -> Checkpoint:
    if not shape:
        return small(generation)
    name = SPECS[generation].partition("?")[0]
    window = "" if generation == 1 else "&window=4"
    return random_checkpoint(f"{name}?{shape}{window}&seed={generation}")


def planted(checkpoint: Checkpoint, factor: float = 30.0) -> Checkpoint:
    """With a huge row in every `down_proj`, a huge value head channel, and one gain of fifty in every norm."""
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    for name, tensor in tensors.items():
        if name.endswith(("down_proj.weight", "v_proj.weight")):
            tensor[3] *= factor
        elif tensor.ndim == 1:
            tensor[2] = 49.0
    return replace(checkpoint, tensors=tensors)


def quiet(checkpoint: Checkpoint) -> Checkpoint:
    """With sublayers that add nothing: the residual stream is the embedding, which then reaches its bound."""
    silent = ("o_proj.weight", "down_proj.weight")
    tensors = {
        name: torch.zeros_like(tensor) if name.endswith(silent) else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def bounds_and_states(checkpoint: Checkpoint, dtype: str) -> tuple[dict[str, SiteBound], dict[int, States]]:
    states: dict[int, States] = {}
    found = bound_sites(
        checkpoint, dtype, witnesses=lambda index, layer: states.__setitem__(index, states_of(layer, checkpoint.config))
    )
    return {one.site: one for one in found}, states


def random_states(checkpoint: Checkpoint, count: int = 1500) -> dict[int, States]:
    """Many states of very different shapes: dense, with one or two large channels, large and small."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for index in range(checkpoint.config.layers):
        states = torch.randn(count, checkpoint.config.hidden_size, generator=generator)
        states = states * torch.randn(states.shape, generator=generator).mul(2).exp()  # a few channels dominate
        states = states * torch.randn(count, 1, generator=generator).exp()
        pairs = tuple((distance, states[2 * distance : 2 * distance + 2]) for distance in (1, 2, 5, 9))
        made[index] = States(attention=states, mlp=states, pairs=pairs)
    return made


def largest_of_prompts(model: Gemma, kind: str = "native") -> dict[str, float]:
    """Over a batch of random prompts; a tensor that holds an infinity counts as infinite."""
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(0, model.config.vocabulary, (24, 12), generator=generator)
    with torch.inference_mode(), record(model, formats=(), matmul=kind) as recording:
        model(tokens)
    found: dict[str, float] = {}
    for one in recording:
        amax = float("inf") if one.positive_inf or one.negative_inf else one.amax or 0.0
        found[one.site] = max(found.get(one.site, 0.0), amax)
    return found


def largest_of_states(checkpoint: Checkpoint, states: dict[int, States]) -> dict[str, float]:
    model = build(stored_in(checkpoint, torch.float16))
    return values(confirm(model, states) | confirm_head(model))


def values(largest: dict[str, Largest]) -> dict[str, float]:
    return {site: one.value for site, one in largest.items()}


def exceeding(bounds: dict[str, SiteBound], found: dict[str, float]) -> dict[str, tuple[float, float]]:
    """The sites at which a bound was exceeded: bound and value."""
    return {
        site: (bounds[site].bound, value)
        for site, value in found.items()
        if site in bounds and value > bounds[site].bound
    }
