"""The model to repair, which can be opened as often as needed: in each dtype, as it is or scaled."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stabilitykit.checkpoints import Checkpoint, GemmaConfig
from stabilitykit.checkpoints.checkpoint import LazyTensors
from stabilitykit.checkpoints.hub import local_folder
from stabilitykit.checkpoints.huggingface import tensors_of, weight_files
from stabilitykit.errors import MisuseError
from stabilitykit.models import transformers as hf
from stabilitykit.models.devices import parse_dtype
from stabilitykit.models.gemma import build
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.machine import Examined
from stabilitykit.models.stream import stored_weight
from stabilitykit.models.subject import Subject
from stabilitykit.models.transformers.plain import align
from stabilitykit.records.scaling import UNCHANGED, Factor, Scaling
from stabilitykit.remedies.streamed import HELD, open_scaled
from stabilitykit.scaling.apply import scaled, tensors_by_name, with_settings

CALLED: Mapping[str, str] = {"rms_eps": "rms_norm_eps", "query_scalar": "query_pre_attn_scalar"}
"""What config.json calls the settings of a GemmaConfig that a scaling may change."""


class Original(Examined, Protocol):
    """`trust_remote_code`: whether Python code that a folder brings may run."""

    @property
    def trust_remote_code(self) -> bool: ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """The config, nested as the keys of a scaling's settings are."""
        ...

    def open(self, dtype: str = "float32", scaling: Scaling = UNCHANGED) -> Subject:
        """The model in `dtype`, its weights and settings scaled in float32 before they are rounded to it, once."""
        ...

    def weights(self, subject: Subject) -> Iterable[tuple[str, Tensor]]:
        """The parameters of `subject`, which is this model in float32, by their names in it, each once."""
        ...


@dataclass(frozen=True, slots=True)
class GemmaOriginal:
    """A Gemma 1, 2 or 3 as the kit's own model runs it."""

    checkpoint: Checkpoint
    device: str = "cpu"
    trust_remote_code: bool = False

    @property
    def source(self) -> str:
        return self.checkpoint.source

    @property
    def sha256(self) -> str:
        return self.checkpoint.sha256

    @property
    def notes(self) -> tuple[str, ...]:
        return self.checkpoint.notes

    @property
    def settings(self) -> Mapping[str, Any]:
        return asdict(self.checkpoint.config)

    def open(self, dtype: str = "float32", scaling: Scaling = UNCHANGED) -> GemmaSubject:
        return GemmaSubject(build(scaled_checkpoint(self.checkpoint, scaling), dtype=dtype, device=self.device))

    def weights(self, subject: Subject) -> Iterable[tuple[str, Tensor]]:
        return self.checkpoint.tensors.items()


@dataclass(frozen=True, slots=True)
class HuggingFaceOriginal:
    """Whatever transformers builds from a folder; `how` are options of `open_model` other than the dtype."""

    name: str
    first: hf.HuggingFaceModel
    how: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, **how: Any) -> "HuggingFaceOriginal":
        """Opens the folder `name` in float32 for the first time; weights that are large are streamed where they can be.

        Raises as `open_model` does.
        """
        if how.get("adapter") is None and is_large(local_folder(name)):
            try:
                first = hf.open_model(name, whole=True, **how, stream=True)
                made = cls(name, first, {**how, "stream": True})
                return replace(made, first=made._streamed())  # as those that are scaled, to the last bit
            except MisuseError:  # quantised, or made of several tensors while they are loaded
                pass
        first = hf.open_model(name, whole=True, **how)
        align(first.module)
        return cls(name, first, how)

    @property
    def trust_remote_code(self) -> bool:
        return bool(self.how.get("trust_remote_code"))

    @property
    def source(self) -> str:
        return self.first.source

    @property
    def sha256(self) -> str:
        return self.first.sha256

    @property
    def notes(self) -> tuple[str, ...]:
        return self.first.notes

    @property
    def settings(self) -> Mapping[str, Any]:
        found: dict[str, Any] = self.first.causal.config.to_dict()
        return found

    def open(self, dtype: str = "float32", scaling: Scaling = UNCHANGED) -> hf.HuggingFaceModel:
        """In float32 and unchanged it is the same model each time: do not write to its weights."""
        if dtype == "float32" and scaling == UNCHANGED:
            return self.first
        settings = with_settings(self.settings, scaling.settings) if scaling.settings else None
        if dtype == "float32" and self.is_streamed:
            return self._streamed(scaling.parameters, settings)
        how = dict(self.how)
        if scaling.parameters:  # they are put in the place of weights in memory
            how["stream"] = False
        opened = hf.open_model(self.name, whole=True, dtype=parse_dtype(dtype), settings=settings, **how)
        if scaling.parameters or not self.is_streamed:
            align(opened.module)
        low = tensors_by_name(opened.module)
        with torch.no_grad():
            for name, factor in scaling.parameters.items():
                low[name].data = scaled(stored_weight(self.first.module, name), factor).to(low[name].dtype)
        return opened

    def _streamed(
        self, factors: Mapping[str, Factor] | None = None, settings: Mapping[str, Any] | None = None
    ) -> hf.HuggingFaceModel:
        folder, trusted = local_folder(self.name), self.trust_remote_code
        module: Any = open_scaled(folder, factors, settings, trust_remote_code=trusted).module
        if self.how.get("attention") is not None:
            module.set_attn_implementation(self.how["attention"])
        return replace(self.first, module=module)

    @property
    def is_streamed(self) -> bool:
        return bool(self.how.get("stream"))

    def weights(self, subject: Subject) -> Iterable[tuple[str, Tensor]]:
        for name, _ in subject.module.named_parameters():
            yield name, stored_weight(subject.module, name)


def is_large(folder: Path) -> bool:
    """Whether the weights in a folder take more memory in float32 than a repair should hold."""
    return 4 * sum(tensor.numel() for path in weight_files(folder) for tensor in tensors_of(path).values()) > HELD


def setting(settings: Mapping[str, Any], key: str) -> float:
    """A number in nested settings, by the keys that lead to it, joined by dots. Raises KeyError where there is none."""
    found: Any = settings
    for part in key.split("."):
        found = found[part]
    return float(found)


def scaled_checkpoint(checkpoint: Checkpoint, scaling: Scaling) -> Checkpoint:
    """`checkpoint` with its tensors scaled when they are asked for, in float32, and its settings.

    Settings are fields of GemmaConfig. Raises KeyError for a parameter that the checkpoint does not have.
    """
    if scaling == UNCHANGED:
        return checkpoint
    absent = scaling.parameters.keys() - checkpoint.tensors.keys()
    if absent:
        raise KeyError(*sorted(absent))

    def made(name: str) -> Tensor:
        tensor, factor = checkpoint.tensors[name], scaling.parameters.get(name)
        return tensor if factor is None else scaled(tensor, factor)

    config = GemmaConfig(**with_settings(asdict(checkpoint.config), scaling.settings))
    return replace(
        checkpoint,
        config=config,
        tensors=LazyTensors(checkpoint.tensors, made),
        notes=(*checkpoint.notes, "scaled by powers of two"),
    )
