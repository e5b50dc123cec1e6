"""An adapter merged into the weights in float32, and rounded after that."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from stabilitykit.recorder.names import site_path
from stabilitykit.records.scaling import UNCHANGED
from stabilitykit.remedies.remedy import LeftOut
from stabilitykit.trials.altered import Altered
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.candidates.large_weights import in_float32, moved, past_maximum, said
from stabilitykit.trials.reproduction import copied
from stabilitykit.trials.situation import Situation
from stabilitykit.words import number

NAME = "merged in float32"
_ADAPTER = re.compile(r"\.(?:lora_|base_layer)")  # what peft puts in the place of a layer


def merged(situation: Situation) -> Iterator[Candidate | LeftOut]:
    """Where the model that is run, or its float32 original, has an adapter on top of its weights."""
    reproduction = situation.reproduction
    if situation.broke is None or reproduction.dtype != "float16" or situation.is_outside:
        return
    wide: Any = reproduction.model("float32")
    if not hasattr(wide, "merge_and_unload"):
        return
    whole = wide.merge_and_unload()
    past = past_maximum(whole)
    returned = _returned(situation, whole)
    scaling, stuck = moved(whole, {**past, **{name: max(size, past.get(name, 0.0)) for name, size in returned.items()}})
    stuck = tuple(name for name in stuck if name in past)
    if stuck:
        yield LeftOut(
            NAME,
            f"Merged, {site_path(stuck[0])} reaches {number(past[stuck[0]])}, which float16 does not hold, and no "
            "power of two can be moved out of it.",
        )
        return
    summary = f"Adds the adapter's product to the weights in float32, and rounds the sum to {reproduction.dtype}."
    command = ["model = model.float().merge_and_unload()"]
    if scaling != UNCHANGED:
        sizes = {site_path(name): size for name, size in past.items()} or {
            f"what {site_path(name).removesuffix('.weight')} returns": size for name, size in returned.items()
        }
        worst = max(sizes, key=lambda one: sizes[one])
        summary += f" Merged, {said(worst, sizes[worst], scaling)}"
        command.append(in_float32(scaling))
    yield Candidate(
        name=NAME,
        summary=summary,
        command="\n".join([*command, f"model = model.to(torch.{reproduction.dtype})"]),
        instead=_Merged(reproduction, lambda model: nullcontext()),
        scaling=scaling,
        carried=True,
    )


def _returned(situation: Situation, whole: nn.Module) -> dict[str, float]:
    """The largest that an adapted layer returns, where it overflows, by the name of its merged weight."""
    names = {site_path(name): name for name, _ in whole.named_parameters()}
    found: dict[str, float] = {}
    for site, record in situation.overflowing.items():
        layer = _ADAPTER.split(site.partition("/")[0])[0]
        name = names.get(f"{layer}.weight")
        if name is not None:
            found[name] = max(found.get(name, 0.0), record.amax or 0.0)
    return found


@dataclass(frozen=True, slots=True)
class _Merged(Altered):
    """With the adapter in the weights."""

    def model(self, dtype: str) -> nn.Module:
        wide: Any = self.of.model("float32")
        return copied(wide.merge_and_unload(), dtype)
