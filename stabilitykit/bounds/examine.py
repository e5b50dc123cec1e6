"""Bounds, what hidden states make, and what prompts made: everything about a checkpoint's range in one list."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from stabilitykit.bounds.bound import LayerMatrices, bound_sites
from stabilitykit.bounds.hidden_states import States, confirm, confirm_head, states_of, stored_in
from stabilitykit.checkpoints import Checkpoint
from stabilitykit.choices import BoundDtype, check_choice
from stabilitykit.models.devices import parse_dtype
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.machine import provenance_of
from stabilitykit.records.bounds import Bounds, Largest, SiteBound, with_largest
from stabilitykit.run.case import Progress, run_case, stage
from stabilitykit.run.source import checkpoint_of
from stabilitykit.run.windows import texts
from stabilitykit.words import quoted


def bound(
    checkpoint: str | Path | Checkpoint,
    *,
    dtype: BoundDtype = "float16",
    command: str | None = None,
    progress: Progress | None = None,
) -> Bounds:
    """Bounds every tensor of a Gemma for every prompt of any length, from its weights alone, rounding included.

    Args:
        checkpoint: what `open_checkpoint` takes or returned; `hf:NAME` for a folder in the local Hugging Face cache.
        dtype: in which results are stored: float16, bfloat16 or float32.
        command: the command line to name in the result, if there was one.
        progress: called with (what is being done, how much of it is done, out of how much).

    Returns:
        Bounds, whose `sites` are in order of execution. Beside each `bound`, a magnitude, stand the largest magnitude
        in three texts (`observed`) and the largest that a search over hidden states found (`found`), both of a float32
        run: how far the bound may be from the truth. `verdict` says what follows.

    Raises:
        MisuseError: for another dtype, or a name that is nowhere.
        CheckpointError: for a checkpoint that is damaged, or is no Gemma 1, 2 or 3.

    >>> tiny = "random:gemma2-2b?layers=2&hidden_size=32&feed_forward=64&heads=4&head_dim=8&vocabulary=512&context=32"
    >>> found = bound(tiny)
    >>> {site.verdict for site in found.sites}
    {'safe for every prompt'}
    >>> all(site.observed <= site.bound for site in found.sites if site.observed is not None)
    True
    """
    check_choice("dtype", dtype, get_args(BoundDtype))
    opened = checkpoint_of(checkpoint, progress)
    prompts = texts(opened.config.context, Tokenizer(opened.vocabulary)).choosing
    return Bounds(
        dtype=dtype,
        sites=tuple(examine(opened, prompts, dtype, progress=progress)),
        **provenance_of(opened, command, "cpu"),
    )


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
