"""A folder as plain transformers loads it, whatever its model is: decoder, encoder, both, or one that sees or hears."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.models.transformers.backend import explained, imported, quiet
from stabilitykit.models.transformers.load import check_loading, named_class

_ALIGNMENT = 64  # bytes: that of torch's own allocator


def read_settings(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The folder's config as nested settings, with the defaults of what config.json leaves out."""
    with quiet(imported()), explained(str(folder)):
        settings: dict[str, Any] = _config(folder, trust_remote_code).to_dict()
    return settings


def load_plain(
    folder: Path,
    dtype: torch.dtype,
    *,
    attention: str | None = None,
    settings: Mapping[str, Any] | None = None,
    kind: Any = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of the class that config.json names, or of `kind`, in evaluation mode.

    `settings` replace those of its config. Raises CheckpointError for a folder that transformers cannot load, and for
    one that lacks a tensor.
    """
    transformers = imported()
    with quiet(transformers), explained(str(folder)):
        config = _config(folder, trust_remote_code, settings)
        if attention is not None:
            config._attn_implementation = attention
        model, loading = _kind(transformers, config, kind, trust_remote_code).from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused by name
        )  # fmt: skip
    check_loading(str(folder), loading)
    loaded: nn.Module = model.eval().requires_grad_(False)
    if dtype == torch.float32:  # in which bits are compared
        align(loaded)
    return loaded


def load_placeholders(
    folder: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    settings: Mapping[str, Any] | None = None,
    kind: Any = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The same model, loaded from `tensors` in place of those in the folder's files, as if its weights were plain."""
    transformers = imported()
    with quiet(transformers), explained(str(folder)):
        config = _config(folder, trust_remote_code, settings)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        model, loading = _kind(transformers, config, kind, trust_remote_code).from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    check_loading(str(folder), loading)
    loaded: nn.Module = model
    return loaded


def align(model: nn.Module) -> None:
    """`aligned` of all of a model's weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = aligned(tensor.data)


def aligned(tensor: Tensor) -> Tensor:
    """A weight that is mapped from a file, at a place in memory like any other's.

    Where in memory numbers lie decides by which instructions a processor sums them up, and so about the last bit.
    """
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _config(folder: Path, trust_remote_code: bool, settings: Mapping[str, Any] | None = None) -> Any:
    config = imported().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    return config if settings is None else type(config).from_dict(copy.deepcopy(dict(settings)))


def _kind(transformers: Any, config: Any, kind: Any, trust_remote_code: bool) -> Any:
    return named_class(transformers, config, trust_remote_code) if kind is None else kind
