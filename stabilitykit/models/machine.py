"""What ran: the versions of what computes, the machine, and where a result comes from."""

import os
import platform
from functools import cache
from importlib.metadata import version
from typing import Any, Protocol, TypedDict

import torch


@cache
def versions() -> dict[str, str]:
    return {name: version(name) for name in ("stabilitykit", "torch")} | {"python": platform.python_version()}


def machine(device: str) -> dict[str, Any]:
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }


class Origin(TypedDict):
    """The fields of a `CheckpointProvenance`."""

    checkpoint: str
    sha256: str
    notes: tuple[str, ...]
    command: str | None
    versions: dict[str, str]
    machine: dict[str, Any]


class Examined(Protocol):
    """A checkpoint, or a model: where its weights come from."""

    @property
    def source(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


def provenance_of(checkpoint: Examined, command: str | None, device: str) -> Origin:
    """Where what `command` finds about `checkpoint` on `device` comes from, here and now."""
    return Origin(
        checkpoint=checkpoint.source,
        sha256=checkpoint.sha256,
        notes=checkpoint.notes,
        command=command,
        versions=versions(),
        machine=machine(device),
    )
