"""From a checkpoint to a model that runs."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from stabilitykit.checkpoints.cache import Progress
from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.checkpoints.config import GemmaConfig
from stabilitykit.checkpoints.mistakes import usual_mistake
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.checkpoints.sources import open_checkpoint
from stabilitykit.choices import RoundingName
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.devices import parse_device, parse_dtype
from stabilitykit.models.gemma.model import Gemma, RMSNorm
from stabilitykit.models.memory import must_stream
from stabilitykit.models.stream import STREAMED, StoredWeight, cast
from stabilitykit.models.stream import stream as stream_weights
from stabilitykit.records.scaling import UNCHANGED, Scaling
from stabilitykit.words import listed


def build(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    rounding: RoundingName = "transformers",
    scaling: Scaling = UNCHANGED,
    stream: bool | None = None,
    beside: int = 0,
    progress: Progress | None = None,
) -> Gemma:
    """The checkpoint's model in `dtype` on `device`, for inference: eval mode, no parameter needs a gradient.

    Weights are multiplied by the powers of two of `scaling` in float32, then rounded to `dtype` (nearest even;
    magnitudes past its range become infinite), then moved, one at a time: the peak is the model and one tensor. Tensors
    that need none of it are used as they are, memory-mapped where the checkpoint's are: replace parameters, never
    write. Gains 1 + w are multiplied outside their weight, by `RMSNorm.scale`, so that nothing is rounded. The settings
    of `scaling` are fields of the config.

    With `stream` each matrix is read, scaled and cast by every call that needs it, and dropped after that: the same
    bits from a model that does not fit. None streams where the weights, and `beside` more bytes for a prompt, do not
    fit in the memory that is free. `progress` is called with the bytes of the model that are done and those in all,
    after each tensor.

    Raises CheckpointError, listing them, for tensors that are missing, unexpected or of another shape than the
    config says; MisuseError for an unknown dtype or rounding, a device that is not there, or a scaling of what this
    model does not have, or of blocks of a tensor.
    """
    target = parse_dtype(dtype)
    place = parse_device(device)
    shapes = parameter_shapes(checkpoint.config)
    _check_names(checkpoint, shapes)
    with torch.device("meta"):
        model = Gemma(_with_settings(checkpoint.config, scaling), rounding=rounding)
    factors = _factors(model, scaling, shapes)

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
        factor = factors.get(name, 1.0)
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
    model.source, model.sha256, model.notes = checkpoint.source, checkpoint.sha256, checkpoint.notes
    if stream:
        model.streamed, model.notes = True, (*model.notes, STREAMED)
    if scaling != UNCHANGED:
        model.scaling = scaling
        by = "powers of two" if model.rescale == 1 else f"2^{round(math.log2(model.rescale))}"
        model.notes = (*model.notes, f"scaled by {by}")
    model.vocabulary, model.eos = checkpoint.vocabulary, checkpoint.vocabulary.eos
    return model.eval()


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    rounding: RoundingName = "transformers",
    scaling: Scaling = UNCHANGED,
    stream: bool | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Gemma:
    """`build` of the checkpoint that `source` names; see `open_checkpoint` for sources and `cache`.

    `progress` counts bytes: of the cache where it must be filled first, then of the model.
    """
    checkpoint = open_checkpoint(source, cache=cache, progress=progress)
    return build(
        checkpoint, dtype=dtype, device=device, rounding=rounding, scaling=scaling, stream=stream, progress=progress
    )


def _with_settings(config: GemmaConfig, scaling: Scaling) -> GemmaConfig:
    other = [key for key in scaling.settings if not isinstance(getattr(config, key, None), float)]
    if other:
        raise MisuseError(
            f"The settings of a scaling are numbers in a Gemma's config, as rms_eps is; got {other[0]!r}."
        )
    changed = {key: getattr(config, key) * 2.0**power for key, power in scaling.settings.items()}
    return replace(config, **changed) if changed else config


def _factors(model: Gemma, scaling: Scaling, names: Collection[str]) -> dict[str, float]:
    """By its name, what multiplies each weight; gains 1 + w are multiplied here, in their norms."""
    modules, found = dict(model.named_modules()), {}
    for name, factor in scaling.parameters.items():
        module = modules[name.removesuffix(".weight")] if name in names else None
        if (
            module is None
            or len(factor.exponents) != 1
            or factor.added != (1.0 if isinstance(module, RMSNorm) else 0.0)
        ):
            raise MisuseError(
                "A Gemma that is built is scaled by whole tensors: weights, and gains 1 + w where there is a norm; "
                f"{name} is scaled in another way."
            )
        times = 2.0 ** factor.exponents[0]
        if isinstance(module, RMSNorm):
            module.scale = times
        else:
            found[name] = times
    return found


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
