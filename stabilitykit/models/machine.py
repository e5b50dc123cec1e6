"""What ran: the versions of what computes, and the machine."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("stabilitykit", "torch")} | {"python": platform.python_version()}


def machine(device: str) -> dict[str, Any]:
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }
