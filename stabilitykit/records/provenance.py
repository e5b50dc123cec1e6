"""Where a result comes from: part of every file that is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What was measured, and what has to be known to do it again.

    `checkpoint` is its source and `sha256` the digest of its weights, None for a model that came from no file. `notes`
    say what else there is to know about the weights. `command` is the command line, None where there was none;
    `versions` are those of what computes, `machine` is where it ran.
    """

    checkpoint: str | None
    sha256: str | None
    notes: tuple[str, ...] = ()
    command: str | None = None
    versions: Mapping[str, str]
    machine: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointProvenance(Provenance):
    """Of what was found about the weights in a file: both are known."""

    checkpoint: str
    sha256: str
