"""The model that a sweep runs: the kit's own Gemma, or transformers' where `hf:` names another one."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.models import transformers as hf
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.machine import Examined
from stabilitykit.models.subject import Subject
from stabilitykit.run.batch import Asked
from stabilitykit.run.case import Progress
from stabilitykit.run.prompts import Reads
from stabilitykit.run.source import opened_by
from stabilitykit.scaling.stressed import StressedFolder, stressed


class SweptModel(Examined, Protocol):
    """What a plan asks of a model, and the process that runs its cases. `context` counts tokens."""

    @property
    def tokenizer(self) -> Reads: ...
    @property
    def context(self) -> int: ...
    @property
    def config(self) -> Mapping[str, Any]: ...

    def chat(self, asked: Asked) -> list[int]:
        """The tokens of a chat, in the model's own template. Raises MisuseError for a tokenizer without one."""
        ...

    def refused(self, settings: Mapping[str, Any]) -> str | None:
        """Why a case with these settings cannot run on it, in words; None for one that can."""
        ...

    def open(self, settings: Mapping[str, Any], progress: Callable[[int, int], None]) -> Subject:
        """The model as a case's settings have it."""
        ...


@dataclass(frozen=True)
class KitModel:
    """A Gemma that the kit's own code runs."""

    checkpoint: Checkpoint

    @property
    def source(self) -> str:
        return self.checkpoint.source

    @property
    def sha256(self) -> str:
        return self.checkpoint.sha256

    @property
    def notes(self) -> tuple[str, ...]:
        return self.checkpoint.notes

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.checkpoint.vocabulary)

    @property
    def context(self) -> int:
        return self.checkpoint.config.context

    @property
    def config(self) -> Mapping[str, Any]:
        return asdict(self.checkpoint.config)

    def chat(self, asked: Asked) -> list[int]:
        generation = self.checkpoint.config.generation
        return self.tokenizer.chat(asked.text, generation=generation, system=asked.system, earlier=asked.earlier)

    def refused(self, settings: Mapping[str, Any]) -> None:
        return None

    def open(self, settings: Mapping[str, Any], progress: Callable[[int, int], None]) -> Subject:
        model = stressed(
            self.checkpoint,
            settings["rescale"],
            dtype=settings["dtype"],
            device=settings["device"],
            rounding=settings["rounding"],
            progress=progress,
        )
        model.tokenizer = self.tokenizer  # the same as its own, which would take half a second to make
        return GemmaSubject(model)


@dataclass(frozen=True)
class FolderModel:
    """A model that transformers runs."""

    folder: hf.HuggingFaceFolder
    _stressed: dict[float, StressedFolder] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return self.folder.source

    @property
    def sha256(self) -> str:
        return self.folder.sha256

    @property
    def notes(self) -> tuple[str, ...]:
        return self.folder.notes

    @property
    def tokenizer(self) -> Reads:
        return self.folder.tokenizer

    @property
    def context(self) -> int:
        return self.folder.context

    @property
    def config(self) -> Mapping[str, Any]:
        return self.folder.config

    def chat(self, asked: Asked) -> list[int]:
        return self.folder.tokenizer.chat(asked.text, system=asked.system, earlier=asked.earlier)

    def refused(self, settings: Mapping[str, Any]) -> str | None:
        if settings.get("rounding", "transformers") != "transformers":
            return "rounding applies to the kit's own model only, and transformers runs this one; leave it out"
        return None

    def open(self, settings: Mapping[str, Any], progress: Callable[[int, int], None]) -> Subject:
        gamma, how = settings["rescale"], {"dtype": settings["dtype"], "device": settings["device"]}
        if gamma == 1:
            return hf.open_model(self.folder.name, progress=progress, **how)
        if gamma not in self._stressed:
            self._stressed.clear()  # it holds the model in float32
            self._stressed[gamma] = StressedFolder.of(self.folder.name, gamma)
        return self._stressed[gamma].open(**how)


def open_swept(checkpoint: str | Path, progress: Progress | None = None) -> SweptModel:
    """The model that a sweep's `checkpoint` names. Raises as `opened_by` does."""
    opened = opened_by(checkpoint, progress)
    return KitModel(opened) if isinstance(opened, Checkpoint) else FolderModel(opened)
