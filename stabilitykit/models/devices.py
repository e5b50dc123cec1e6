"""The dtypes that a model runs in, and the device it runs on."""

from collections.abc import Mapping

import torch

from stabilitykit.errors import MisuseError

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`torch.float16` from itself, "float16" or "torch.float16". Raises MisuseError for what a model cannot run in."""
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise MisuseError(f"Unknown dtype {str(dtype)!r}; choose one of: {', '.join(DTYPES)}.")
    return found


def parse_device(device: str | torch.device) -> torch.device:
    """The device, once something could be put on it. Raises MisuseError with torch's reason where it cannot."""
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise MisuseError(f"The device {str(device)!r} cannot be used here: {reason}. Try 'cpu'.") from error
    return place
