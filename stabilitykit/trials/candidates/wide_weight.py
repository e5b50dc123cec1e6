"""A weight that only float32 holds, kept in float32."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from stabilitykit.recorder.names import site_path
from stabilitykit.scaling.apply import tensors_by_name
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.candidates.replaced import lost_in
from stabilitykit.trials.situation import Situation
from stabilitykit.trials.stored import wide_like, wide_values
from stabilitykit.trials.widened import widened
from stabilitykit.words import listed

NAME = "weight in float32"


def wide_weight(situation: Situation) -> Iterator[Candidate]:
    """Where weights are finite in float32, and not in the failing dtype."""
    if situation.kind != "weight" or situation.reproduction.dtype not in ("float16", "bfloat16"):
        return
    found = lost_in(situation)
    if not found or not all(math.isfinite(one) for one in wide_values(situation, found).values()):
        return
    wide = wide_like(situation.models, situation.model)
    paths = list(dict.fromkeys(one.name.rpartition(".")[0] for one in found))
    if any(list(situation.model.get_submodule(path).children()) for path in paths):
        return
    held = {path: tensors_by_name(wide.get_submodule(path)) for path in paths}
    low = situation.reproduction.dtype
    yield Candidate(
        name=NAME,
        summary=f"Keeps {listed([site_path(path) or 'the model' for path in paths], 3)} in float32, and rounds what "
        f"{'it returns' if len(paths) == 1 else 'they return'} to {low}.",
        command="\n".join(
            f"model{f'.get_submodule({path!r})' if path else ''}.float()  # before the cast; and cast what it is given"
            for path in paths
        ),
        around=partial(_around, held),
        extra=sum(one.numel() * 2 for tensors in held.values() for one in tensors.values()),
    )


@contextmanager
def _around(held: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for path, tensors in held.items():
            stack.enter_context(widened(model.get_submodule(path), tensors=tensors))
        yield
