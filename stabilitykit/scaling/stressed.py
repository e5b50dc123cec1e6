"""Models opened under stress: scaled until a format overflows, float32 logits bit for bit what they were."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.checkpoints.cache import Progress
from stabilitykit.errors import MisuseError
from stabilitykit.models.devices import parse_dtype
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.models.transformers import HuggingFaceModel, open_model
from stabilitykit.records.scaling import Scaling
from stabilitykit.scaling.apply import rounded, scaled, tensors_by_name, with_settings
from stabilitykit.scaling.stress import check_gamma, stress, stress_of_gemma
from stabilitykit.scaling.subjects import blueprint_of, continued
from stabilitykit.scaling.trace import trace
from stabilitykit.words import counted, listed

_TEXT = "def mean(xs): return sum(xs) / len(xs)  # 42, the answer; Fjord, naïve, 東京"  # of many kinds, for experts
_TRACED = 32  # tokens of it at most
_LAYER = re.compile(r".*?\.\d+\.")
_ALIGNMENT = 64  # bytes: as far as a processor's instructions care


def stressed(checkpoint: Checkpoint, gamma: float, **how: Any) -> Gemma:
    """`build` of the checkpoint, scaled by `gamma`: `stress_of_gemma` says by what, and what it raises."""
    return build(checkpoint, scaling=stress_of_gemma(checkpoint.config, gamma), **how)


@dataclass(frozen=True, slots=True)
class StressedFolder:
    """A model that transformers runs, and `scaling`, by which it is opened in any dtype.

    `wide` is the model as it is, in float32; `how` are options of `open_model` other than dtype and device.
    """

    name: str
    gamma: float
    scaling: Scaling
    wide: HuggingFaceModel
    how: dict[str, Any]

    @classmethod
    def of(
        cls, name: str, gamma: float, *, stream: bool | None = None, progress: Progress | None = None, **how: Any
    ) -> "StressedFolder":
        """The model in the folder `name`, traced on a short text in bfloat16.

        Raises MisuseError for a γ that is no power of two from 2^-24 to 2^24, weights that are to be streamed or are
        quantised, a model of which a part of a layer took no part in the run, and where no exact scaling exists, with
        what stands in the way; else as `open_model` does.
        """
        check_gamma(gamma)
        if stream:
            raise MisuseError("The weights of an hf: model under stress are in memory; leave out --stream.")
        low = open_model(name, dtype="bfloat16", stream=False, progress=progress, **how)
        scaling = _scaling(low, gamma)
        del low
        return cls(name, gamma, scaling, open_model(name, stream=False, **how), how)

    def open(
        self,
        dtype: str | torch.dtype = "float32",
        *,
        device: str | torch.device = "cpu",
        progress: Progress | None = None,
    ) -> HuggingFaceModel:
        """In `dtype`: weights are scaled in float32 and rounded once. float32 logits are those of the model as it is,
        bit for bit, but for gains c + w that float32 has to round, which a note counts.
        """
        target = parse_dtype(dtype)
        settings = with_settings(self.wide.causal.config.to_dict(), self.scaling.settings)
        opened = open_model(
            self.name, dtype=target, device=device, stream=False, settings=settings, progress=progress, **self.how
        )
        wide, lost = tensors_by_name(self.wide.causal), 0
        for name, tensor in tensors_by_name(opened.causal).items():
            factor = self.scaling.parameters.get(name)
            if factor is not None:
                lost += rounded(wide[name], factor)
                tensor.data = _placed(scaled(wide[name], factor).to(tensor.dtype), wide[name]).to(tensor.device)
        note = f"scaled by 2^{check_gamma(self.gamma)}"
        if lost:
            note += f", {counted(lost, 'gain')} 1 + w rounded in float32"
        return replace(opened, notes=(*opened.notes, note), facts=opened.facts | {"rescale": self.gamma})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The scaled weights in float32, by the model's names for them."""
        for name, tensor in self.wide.causal.named_parameters():
            factor = self.scaling.parameters.get(name)
            yield name, tensor if factor is None else scaled(tensor, factor)

    @property
    def bytes(self) -> int:
        """How large these are."""
        return sum(tensor.nbytes for tensor in self.wide.causal.parameters())


def _scaling(low: HuggingFaceModel, gamma: float) -> Scaling:
    model = low.causal
    if getattr(model.config, "quantization_config", None) is not None:
        raise MisuseError(f"Weights are scaled as plain numbers, and those of {low.source} are quantised.")
    assert low.tokenizer is not None  # of a causal language model
    ids = low.tokenizer.encode(_TEXT)[: min(_TRACED, low.context)]
    graph = trace(model, continued({"input_ids": torch.tensor([ids])}, steps=0), blueprint_of(model))
    used = {_layer(name) for name in graph.parameters.keys() - set(graph.unused)}
    unused = [name for name in graph.unused if _layer(name) in used]
    if unused:
        raise MisuseError(
            f"{counted(len(unused), 'parameter')} took no part in the run that tells what scales with what "
            f"({listed(unused, 3)}), though other parts of the layer did, so {low.source} cannot be scaled."
        )
    return stress(graph, gamma)


def _layer(name: str) -> str:
    """What a parameter's name begins with, up to the number of its layer; the name itself where it is in none."""
    found = _LAYER.match(name)
    return found[0] if found else name


def _placed(made: Tensor, original: Tensor) -> Tensor:
    """`made` at a place in memory like that of `original`, if that is of its dtype: where numbers lie decides by which
    instructions a processor sums them up, and so about the last bit.
    """
    offset = original.data_ptr() % _ALIGNMENT
    if made.dtype != original.dtype or not offset:
        return made
    room = made.new_empty(made.numel() + 2 * _ALIGNMENT // made.itemsize)
    start = (offset - room.data_ptr()) % _ALIGNMENT // made.itemsize
    return room[start : start + made.numel()].view(made.shape).copy_(made)
