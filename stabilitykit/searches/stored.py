"""Which operators return what a low-precision run stores in low precision, and how their tensors are named."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stabilitykit.models.gemma import Gemma
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.recorder import record
from stabilitykit.recorder.names import by_operator
from stabilitykit.records import Record
from stabilitykit.run.dry_run import find_stored_dtypes


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A tensor as a recording names it: its site, its label, and its layer, if any."""

    site: str
    label: str | None
    layer: int | None


def stored_places(model: Gemma) -> Mapping[str, Place]:
    """The tensors that a float16 run of `model` stores in 16 bits, by operator, named as in `recorder.sites`.

    Logits are left out, since the head costs as much as all layers of a small model; the recorder that confirms a
    prompt counts them. Scores with the mask added are left out too: they equal those before it, or are masked.
    """
    with torch.inference_mode(), record(model, formats=()) as recording:
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device))
    made = list(by_operator(find_stored_dtypes(recording, GemmaSubject(model), 1, 1)))
    masked = {_last_before(made, index) for index, (_, found) in enumerate(made) if found.operator == "softmax"}
    return {
        name: Place(site=found.site, label=found.label, layer=found.layer)
        for index, (name, found) in enumerate(made)
        if index not in masked and found.stored_dtype == "float16" and _is_of_body(found)
    }


def _last_before(made: list[tuple[str, Record]], softmax: int) -> int:
    """The softmax reads what its module made just before it."""
    return next(i for i in range(softmax - 1, -1, -1) if made[i][1].module == made[softmax][1].module)


def _is_of_body(found: Record) -> bool:
    return found.layer is not None or found.module.partition(".")[0] in ("embed_tokens", "norm")
