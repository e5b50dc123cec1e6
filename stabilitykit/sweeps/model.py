"""The model that a sweep runs: the kit's own Gemma, or transformers' where `hf:` names another one."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.cache import cache_folder
from stabilitykit.checkpoints.hub import local_folder
from stabilitykit.checkpoints.huggingface import files_sha256, read_config, weight_files
from stabilitykit.models import transformers as hf
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.machine import Examined
from stabilitykit.models.subject import Subject
from stabilitykit.models.transformers.backend import PREFIX
from stabilitykit.run.case import Progress, stage
from stabilitykit.run.prompts import Reads
from stabilitykit.run.source import kits_own
from stabilitykit.scaling.stressed import StressedFolder, stressed


class SweptModel(Examined, Protocol):
    """What a plan asks of a model, and the process that runs its cases. `context` counts tokens."""

    @property
    def tokenizer(self) -> Reads: ...
    @property
    def context(self) -> int: ...
    @property
    def config(self) -> Mapping[str, Any]: ...

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
    """A model that transformers runs, from the folder or the name behind `hf:`."""

    name: str
    sha256: str
    config: Mapping[str, Any]
    tokenizer: Reads
    notes: tuple[str, ...] = ()
    _stressed: dict[float, StressedFolder] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, progress: Progress | None = None) -> "FolderModel":
        """Reads what a plan needs, and no weight. Raises as `hf.open_tokenizer` does."""
        folder = local_folder(name)
        return cls(
            name=name,
            sha256=files_sha256(weight_files(folder), cache_folder(), stage("reading weights", progress)),
            config=read_config(folder),
            tokenizer=hf.open_tokenizer(name),
            notes=hf.run_by(),
        )

    @property
    def source(self) -> str:
        return f"{PREFIX}{self.name}"

    @property
    def context(self) -> int:
        return hf.context_of(self.config)

    def refused(self, settings: Mapping[str, Any]) -> str | None:
        if settings.get("rounding", "transformers") != "transformers":
            return "rounding applies to the kit's own model only, and transformers runs this one; leave it out"
        return None

    def open(self, settings: Mapping[str, Any], progress: Callable[[int, int], None]) -> Subject:
        gamma, how = settings["rescale"], {"dtype": settings["dtype"], "device": settings["device"]}
        if gamma == 1:
            return hf.open_model(self.name, progress=progress, **how)
        if gamma not in self._stressed:
            self._stressed.clear()  # it holds the model in float32
            self._stressed[gamma] = StressedFolder.of(self.name, gamma)
        return self._stressed[gamma].open(**how)


def open_swept(checkpoint: str | Path, progress: Progress | None = None) -> SweptModel:
    """The model that a sweep's `checkpoint` names. Raises as `open_checkpoint` and `hf.open_tokenizer` do."""
    own = kits_own(checkpoint, progress)
    return KitModel(own) if own is not None else FolderModel.of(str(checkpoint).removeprefix(PREFIX), progress)
