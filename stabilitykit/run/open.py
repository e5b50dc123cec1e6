"""The one way to open a model, whoever runs it."""

from pathlib import Path
from typing import Any, get_args

import torch

from stabilitykit.checkpoints.cache import Progress
from stabilitykit.checkpoints.sources import open_checkpoint
from stabilitykit.choices import Attention, RoundingName, check_choice
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.subject import Subject
from stabilitykit.models.transformers import open_model as open_transformers
from stabilitykit.models.transformers.backend import PREFIX
from stabilitykit.scaling.stress import check_gamma
from stabilitykit.scaling.stressed import StressedFolder, stressed


def open_model(
    checkpoint: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    rounding: RoundingName = "transformers",
    rescale: float = 1.0,
    attention: Attention | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    stream: bool | None = None,
    progress: Progress | None = None,
) -> Subject:
    """The kit's own model of a checkpoint or, where its name begins with `hf:`, transformers' model.

    Args:
        checkpoint: what `open_checkpoint` takes, or `hf:FOLDER` or `hf:OWNER/NAME` for whatever transformers loads
            (extra: hf): the causal language model or, where there is none, the class that the folder's config names.
            Nothing is downloaded: a name is looked up in the local Hugging Face cache.
        dtype: float16, bfloat16, float32 or float64, as a name or a torch.dtype.
        device: cpu, cuda or mps.
        rounding: the implementation whose rounding points the kit's own model reproduces.
        rescale: γ, a power of two from 2^-24 to 2^24 by which what the embedding writes is scaled, or what the first
            projection does, and all that follows with it. float32 logits keep every bit; of hf: models with gains 1 + w
            but for those gains that float32 rounds, which a note counts.
        attention: of `hf:` models, eager or sdpa; None leaves the choice to transformers.
        adapter: of `hf:` models, the folder of an adapter that peft reads, such as a LoRA.
        trust_remote_code: run Python code that an `hf:` folder brings. Without it such code never runs, and a folder
            that needs it is refused.
        stream: read each weight matrix when it is used and drop it afterwards; None does so where the weights do not
            fit in the free memory. The bits are the same.
        progress: called with (bytes done, bytes in all) while weights are read.

    Returns:
        A Subject, which `profile` and `forecast` take. Its `module` is the torch.nn.Module, for `record`; its `source`,
        `sha256` and `notes` say where it comes from.

    Raises:
        MisuseError: for an unknown name, dtype, device or option, and options of the other kind of model.
        CheckpointError: for a checkpoint that is damaged, or is not what it was taken for.

    >>> tiny = "random:gemma3-270m?layers=1&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512"
    >>> model = open_model(tiny, dtype="float16")
    >>> model.source.split("?")[0], len(model.layers), str(model.module.dtype)
    ('random:gemma3-270m', 1, 'torch.float16')
    """
    check_options(checkpoint, rounding, rescale, attention, adapter, trust_remote_code)
    name = str(checkpoint)
    if not name.startswith(PREFIX):
        opened = open_checkpoint(checkpoint, progress=progress)
        return GemmaSubject(
            stressed(opened, rescale, dtype=dtype, device=device, rounding=rounding, stream=stream, progress=progress)
        )
    name = name.removeprefix(PREFIX)
    how: dict[str, Any] = {
        "attention": attention,
        "adapter": adapter,
        "trust_remote_code": trust_remote_code,
        "stream": stream,
    }
    if rescale != 1:
        return StressedFolder.of(name, rescale, progress=progress, **how).open(dtype, device=device, progress=progress)
    return open_transformers(name, dtype=dtype, device=device, progress=progress, **how)


def check_options(
    checkpoint: str | Path,
    rounding: RoundingName,
    rescale: float,
    attention: Attention | None,
    adapter: str | Path | None,
    trust_remote_code: bool,
) -> None:
    """Raises MisuseError for an unknown choice, and for options that belong to the other kind of model."""
    check_gamma(rescale)
    check_choice("rounding", rounding, get_args(RoundingName))
    if attention is not None:
        check_choice("attention", attention, get_args(Attention))
    if str(checkpoint).startswith(PREFIX):
        if rounding != "transformers":
            raise MisuseError("rounding applies to the kit's own model only; leave it out with hf:.")
    elif attention is not None or adapter is not None or trust_remote_code:
        raise MisuseError(
            "attention, adapter and trust_remote_code apply to transformers' models only; put hf: before the folder or "
            "the name."
        )
