"""The remedies that a repair ranks, where they fit what broke."""

from collections.abc import Iterator

from stabilitykit.remedies import REMEDIES
from stabilitykit.remedies.bfloat16 import bfloat16
from stabilitykit.remedies.remedy import LeftOut
from stabilitykit.trials.candidate import Candidate, of_remedy
from stabilitykit.trials.situation import Situation

_DONE_BY = {
    "scale on queries": "# in attention: (query * scale) @ key.T instead of (query @ key.T) * scale",
    "routing weights in experts": "# in the experts: down_proj(hidden * weight) instead of down_proj(hidden) * weight",
    "float32 norms": "# in these norms: x.float() before the squares, .to(dtype) of what they return",
    "float32 residual": "# keep hidden_states in torch.float32 between layers, and cast what norms return",
    "float32 islands": "# compute what overflows in float32; stabilitykit repair --json lists the sites",
    "clamp": "# hidden_states.clamp(-65504, 65504) after each sum",
}


def ranked(situation: Situation) -> Iterator[Candidate | LeftOut]:
    """Where something overflows float16."""
    if situation.reproduction.dtype != "float16" or not situation.overflowing:
        return
    seen = situation.seen
    tokens = max((one.positions or 1 for one in situation.low), default=1)
    for offer in REMEDIES:
        if offer is bfloat16:
            continue
        made = offer(seen)
        if isinstance(made, LeftOut):
            yield made
        else:
            yield of_remedy(made, _DONE_BY[made.name], tokens)
