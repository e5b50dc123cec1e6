"""Bounds, what hidden states make, and what prompts made: everything about a checkpoint's range in one list."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from stabilitykit.bounds.bound import bound_sites
from stabilitykit.bounds.families import open_decoder
from stabilitykit.bounds.hidden_states import States, confirm, confirm_head, states_of, stored_in
from stabilitykit.bounds.recipe import Decoder
from stabilitykit.bounds.weights import LayerMatrices
from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.huggingface import CONFIG, GENERATIONS, read_config
from stabilitykit.choices import BoundDtype, check_choice
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.devices import parse_dtype
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.machine import provenance_of
from stabilitykit.models.subject import Subject
from stabilitykit.models.transformers import open_model as open_transformers
from stabilitykit.models.transformers.backend import PREFIX
from stabilitykit.records.bounds import Bounds, Largest, SiteBound, with_largest
from stabilitykit.run.case import Progress, run_case, stage
from stabilitykit.run.source import checkpoint_of, local_path
from stabilitykit.run.windows import texts
from stabilitykit.words import quoted


def bound(
    checkpoint: str | Path | Checkpoint | Decoder,
    *,
    dtype: BoundDtype = "float16",
    command: str | None = None,
    progress: Progress | None = None,
) -> Bounds:
    """Bounds every tensor of a decoder for every prompt of any length, from its weights alone, rounding included.

    Args:
        checkpoint: what `open_checkpoint` takes or returned; `hf:NAME` for a folder in the local Hugging Face cache,
            which may be a Llama, Mistral, Qwen2, Qwen3 or the text part of a Gemma 4, too.
        dtype: in which results are stored: float16, bfloat16 or float32.
        command: the command line to name in the result, if there was one.
        progress: called with (what is being done, how much of it is done, out of how much).

    Returns:
        Bounds, whose `sites` are in order of execution. Beside each `bound`, a magnitude, stand the largest magnitude
        in three texts (`observed`) and, for Gemma 1 to 3, the largest that a search over hidden states found (`found`),
        both of a float32 run: how far the bound may be from the truth. `verdict` says what follows. `unbounded` says
        why a tensor has no bound. The texts of other decoders are run by transformers, in eager mode; where that
        cannot be, `notes` say why.

    Raises:
        MisuseError: for another dtype, or a name that is nowhere.
        CheckpointError: for a checkpoint that is damaged, or of a family for which there is no inequality.

    >>> tiny = "random:gemma2-2b?layers=2&hidden_size=32&feed_forward=64&heads=4&head_dim=8&vocabulary=512&context=32"
    >>> found = bound(tiny)
    >>> {site.verdict for site in found.sites}
    {'safe for every prompt'}
    >>> all(site.observed <= site.bound for site in found.sites if site.observed is not None)
    True
    """
    check_choice("dtype", dtype, get_args(BoundDtype))
    opened = opened_for(checkpoint, progress)
    if isinstance(opened, Checkpoint):
        prompts = texts(opened.config.context, Tokenizer(opened.vocabulary)).choosing
        sites, notes = examine(opened, prompts, dtype, progress=progress), opened.notes
    else:
        sites, more = _examined(opened, dtype, progress)
        notes = (*opened.notes, *more)
    origin = provenance_of(opened, command, "cpu")
    origin["notes"] = notes
    return Bounds(dtype=dtype, sites=tuple(sites), **origin)


def opened_for(checkpoint: str | Path | Checkpoint | Decoder, progress: Progress | None = None) -> Checkpoint | Decoder:
    """What `bound` takes, opened: the kit's own Gemma or, where `hf:` names one of another family, a Decoder."""
    if isinstance(checkpoint, Decoder):
        return checkpoint
    if not isinstance(checkpoint, Checkpoint) and str(checkpoint).startswith(PREFIX):
        folder = local_path(checkpoint)
        if (folder / CONFIG).is_file() and str(read_config(folder).get("model_type")) not in GENERATIONS:
            return open_decoder(folder, progress=stage("reading weights", progress))
    return checkpoint_of(checkpoint, progress)


def _examined(decoder: Decoder, dtype: str, progress: Progress | None) -> tuple[list[SiteBound], tuple[str, ...]]:
    """The bounds of a decoder that transformers runs, with what three texts made of it; notes where none were run."""
    bounds = bound_sites(decoder, dtype, progress=progress)
    try:
        subject = open_transformers(
            decoder.source, dtype="float32", attention="eager", progress=stage("preparing weights", progress)
        )
    except (CheckpointError, MisuseError) as error:
        return bounds, (f"no text was run: {error}",)
    if subject.tokenizer is None:
        return bounds, ("no text was run: the folder has no tokenizer",)
    with torch.no_grad():
        for weight in subject.module.parameters():
            weight.copy_(weight.to(parse_dtype(dtype)))
    prompts = texts(subject.context, subject.tokenizer).choosing
    return with_largest(bounds, "observed", observe(subject, prompts, progress=progress)), ()


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


def observe(
    model: Gemma | Subject, prompts: Sequence[Sequence[int]], *, progress: Progress | None = None
) -> dict[str, Largest]:
    """The largest finite magnitude at each site over all prompts, and where it was; masked scores are not counted."""
    found: dict[str, Largest] = {}
    every = isinstance(model, Gemma)  # which transformers' generate has no place for
    for number, ids in enumerate(prompts, start=1):
        for one in run_case(model, ids, formats=(), every_logit=every, progress=progress).recording:
            if one.amax is None or (one.site in found and found[one.site].value >= one.amax):
                continue
            token = "" if one.amax_token_text is None else f" {quoted(one.amax_token_text)}"
            place = "" if one.amax_position is None else f", token {one.amax_position:,}{token}"
            found[one.site] = Largest(one.amax, prompt=f"text {number}{place}")
    return found
