"""The provenance of a result: part of every file that is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What was measured, and what is needed to repeat it.

    `checkpoint` is the source and `sha256` the digest of the weights, None for a model that was not read from a file.
    `notes` are further facts about the weights. `command` is the command line, None where there was none; `versions`
    are those of the libraries that compute, `machine` describes the hardware.
    """

    checkpoint: str | None
    sha256: str | None
    notes: tuple[str, ...] = ()
    command: str | None = None
    versions: Mapping[str, str]
    machine: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointProvenance(Provenance):
    """The provenance of what was found about the weights in a file, which are known."""

    checkpoint: str
    sha256: str
