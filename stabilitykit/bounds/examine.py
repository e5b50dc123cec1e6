"""Bounds, what hidden states make, and what prompts made: everything about a checkpoint's range in one list."""

from collections.abc import Sequence

from stabilitykit.bounds.bound import LayerMatrices, bound_sites
from stabilitykit.bounds.hidden_states import States, confirm, confirm_head, states_of, stored_in
from stabilitykit.checkpoints import Checkpoint
from stabilitykit.models.devices import parse_dtype
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.records.bounds import Largest, SiteBound, with_largest
from stabilitykit.run.case import Progress, run_case, stage
from stabilitykit.words import quoted


def examine(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    dtype: str = "float16",
    *,
    progress: Progress | None = None,
) -> list[SiteBound]:
    """`bound_sites`, with what was found over hidden states and observed in `prompts`, token ids each.

    Both run in float32, which holds what `dtype` may not, with the weights that a run in `dtype` has. Raises as
    `bound_sites` and `run_case` do.
    """
    states: dict[int, States] = {}

    def search(index: int, layer: LayerMatrices) -> None:
        states[index] = states_of(layer, checkpoint.config)

    bounds = bound_sites(checkpoint, dtype, witnesses=search, progress=progress)

    model = build(stored_in(checkpoint, parse_dtype(dtype)), progress=stage("preparing weights", progress))
    bounds = with_largest(bounds, "found", confirm(model, states, progress=progress) | confirm_head(model))
    return with_largest(bounds, "observed", observe(model, prompts, progress=progress))


def observe(model: Gemma, prompts: Sequence[Sequence[int]], *, progress: Progress | None = None) -> dict[str, Largest]:
    """The largest finite magnitude at each site over all prompts, and where it was; masked scores are not counted."""
    found: dict[str, Largest] = {}
    for number, tokens in enumerate(prompts, start=1):
        for one in run_case(model, tokens, formats=(), every_logit=True, progress=progress).recording:
            if one.amax is None or (one.site in found and found[one.site].value >= one.amax):
                continue
            token = "" if one.amax_token_text is None else f" {quoted(one.amax_token_text)}"
            place = "" if one.amax_position is None else f", token {one.amax_position:,}{token}"
            found[one.site] = Largest(one.amax, prompt=f"text {number}{place}")
    return found
