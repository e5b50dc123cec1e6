"""From a checkpoint to a model that runs."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from stabilitykit.checkpoints.cache import Progress
from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.checkpoints.mistakes import usual_mistake
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.checkpoints.sources import open_checkpoint
from stabilitykit.choices import RoundingName
from stabilitykit.errors import CheckpointError
from stabilitykit.models.devices import parse_device, parse_dtype
from stabilitykit.models.gemma.model import Gemma
from stabilitykit.models.gemma.rescale import check_gamma, rescale_norms, weight_factor
from stabilitykit.models.memory import must_stream
from stabilitykit.models.stream import STREAMED, StoredWeight, cast
from stabilitykit.models.stream import stream as stream_weights
from stabilitykit.words import listed


def build(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    rounding: RoundingName = "transformers",
    rescale: float = 1.0,
    stream: bool | None = None,
    beside: int = 0,
    progress: Progress | None = None,
) -> Gemma:
    """The checkpoint's model in `dtype` on `device`, for inference: eval mode, no parameter needs a gradient.

    Weights are scaled by the rescale γ in float32, then rounded to `dtype` (nearest even; magnitudes
    past its range become infinite), then moved, one at a time: the peak is the model and one tensor. Tensors that
    need none of it are used as they are, memory-mapped where the checkpoint's are: replace parameters, never write.

    With `stream` each matrix is read, scaled and cast by every call that needs it, and dropped after that: the same
    bits from a model that does not fit. None streams where the weights, and `beside` more bytes for a prompt, do not
    fit in the memory that is free. `progress` is called with the bytes of the model that are done and those in all,
    after each tensor.

    Raises CheckpointError, listing them, for tensors that are missing, unexpected or of another shape than the
    config says; MisuseError for an unknown dtype or rounding, a device that is not there, or γ no power of two.
    """
    target = parse_dtype(dtype)
    place = parse_device(device)
    check_gamma(rescale)
    shapes = parameter_shapes(checkpoint.config)
    _check_names(checkpoint, shapes)
    with torch.device("meta"):
        model = Gemma(checkpoint.config, rounding=rounding)

    misshapen = []
    streamed: dict[str, StoredWeight] = {}
    done, total = 0, sum(map(math.prod, shapes.values())) * target.itemsize
    stream = must_stream(stream, total + beside, place)
    for name, shape in shapes.items():
        tensor = checkpoint.tensors[name]
        if tuple(tensor.shape) != shape:
            misshapen.append(f"{name} is {list(tensor.shape)} instead of {list(shape)}")
            continue
        path, _, leaf = name.rpartition(".")
        factor = weight_factor(checkpoint.config, name, rescale)
        if stream and len(shape) > 1:
            read = partial(checkpoint.tensors.__getitem__, name)
            streamed[name] = StoredWeight(read=read, factor=factor, dtype=target, device=place)
        else:
            weight = cast(tensor, factor, target, place)
            setattr(model.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))
        done += tensor.numel() * target.itemsize
        if progress is not None:
            progress(done, total)
    if misshapen:
        raise CheckpointError(f"{checkpoint.source}: tensor shapes do not match the config: {listed(misshapen, 6)}.")

    model.lm_head.weight = model.embed_tokens.weight
    if stream:
        stream_weights(model, streamed)
    rescale_norms(model, rescale)
    model.source, model.sha256, model.notes = checkpoint.source, checkpoint.sha256, checkpoint.notes
    if stream:
        model.streamed, model.notes = True, (*model.notes, STREAMED)
    model.vocabulary, model.eos = checkpoint.vocabulary, checkpoint.vocabulary.eos
    return model.eval()


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    rounding: RoundingName = "transformers",
    rescale: float = 1.0,
    stream: bool | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Gemma:
    """`build` of the checkpoint that `source` names; see `open_checkpoint` for sources and `cache`.

    `progress` counts bytes: of the cache where it must be filled first, then of the model.
    """
    checkpoint = open_checkpoint(source, cache=cache, progress=progress)
    return build(
        checkpoint, dtype=dtype, device=device, rounding=rounding, rescale=rescale, stream=stream, progress=progress
    )


def _check_names(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in shapes if name not in checkpoint.tensors]
    unexpected = [name for name in checkpoint.tensors if name not in shapes]
    if missing or unexpected:
        parts = [f"{len(missing)} missing ({listed(missing, 6)})"] if missing else []
        parts += [f"{len(unexpected)} unexpected ({listed(unexpected, 6)})"] if unexpected else []
        raise CheckpointError(
            f"{checkpoint.source}: tensors are those that the config gives; {' and '.join(parts)}. "
            f"{usual_mistake(missing, unexpected)}"
        )
