"""What a change comes to when it is made by hand: how far its output is from float32's."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stabilitykit.records.trials import Distance, Trial

Run = Callable[[Any], Any]


def output(run: Run, model: Any) -> Tensor:
    """What a run returns: logits, hidden states, or a tensor."""
    with torch.inference_mode():
        found = run(model)
    found = getattr(found, "logits", found)
    found = getattr(found, "last_hidden_state", found)
    assert isinstance(found, Tensor)
    return found.float()


def in_float32(run: Run, model: Any) -> Tensor:
    """The same with the weights as they are, in float32."""
    return output(run, copy.deepcopy(model).float())


def far(ours: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the largest magnitude that was expected; infinite where one is NaN."""
    apart = (ours - expected).abs().nan_to_num(nan=torch.inf)
    return float(apart.max() / expected.abs().max())


def distance_of(trial: Trial) -> Distance:
    assert trial.distance is not None
    return trial.distance
