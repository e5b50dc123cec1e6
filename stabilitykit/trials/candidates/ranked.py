"""The remedies that a repair ranks, where they fit what broke."""

from collections.abc import Callable, Iterator

from stabilitykit.commands import again
from stabilitykit.diagnosis.parts import Part
from stabilitykit.remedies.clamp import clamp
from stabilitykit.remedies.expert_outputs import expert_outputs
from stabilitykit.remedies.float32_islands import keeping_in_float32
from stabilitykit.remedies.float32_norms import float32_norms
from stabilitykit.remedies.float32_residual import float32_residual
from stabilitykit.remedies.query_scale import query_scale
from stabilitykit.remedies.remedy import LeftOut, Remedy
from stabilitykit.remedies.seen import Seen
from stabilitykit.trials.candidate import Candidate, of_remedy
from stabilitykit.trials.situation import Situation
from stabilitykit.words import listed

_DONE_BY = {
    "scale on queries": "# in attention: (query * scale) @ key.T instead of (query @ key.T) * scale",
    "routing weights in experts": "# in the experts: down_proj(hidden * weight) instead of down_proj(hidden) * weight",
    "float32 norms": "# in these norms: x.float() before the squares, .to(dtype) of what they return",
    "float32 residual": "# keep hidden_states in torch.float32 between layers, and cast what norms return",
    "clamp": "# hidden_states.clamp(-65504, 65504) after each sum",
}

_SHOWN = 8  # sites

_STREAM: frozenset[Part] = frozenset({"residual", "sum"})  # what is added up from layer to layer, or added to that
_FIT: tuple[tuple[Callable[[Seen], Remedy | LeftOut], frozenset[Part]], ...] = (
    (query_scale, frozenset({"scores"})),
    (expert_outputs, frozenset({"expert"})),
    (float32_residual, _STREAM | {"norm"}),
    (float32_norms, frozenset({"norm"})),
    (clamp, _STREAM),
)
"""The remedies, and the parts of a model that each of them is for."""


def ranked(situation: Situation) -> Iterator[Candidate | LeftOut]:
    """Where something overflows float16."""
    seen = situation.seen
    if situation.reproduction.dtype != "float16" or not seen.overflowing:
        return
    for offer, parts in _FIT:
        if situation.part not in parts:
            continue
        if offer in (float32_residual, clamp) and situation.casts:
            continue  # what is autocast is added up in float32
        made = offer(seen)
        if isinstance(made, LeftOut):
            yield made
        else:
            yield of_remedy(made, _DONE_BY[made.name], _tokens(situation))
    yield islands(situation)


def islands(situation: Situation) -> Candidate:
    """All that overflows in float32."""
    seen = situation.seen
    sites = listed(list(seen.overflowing), _SHOWN) or "no operator"
    source = situation.reproduction.source
    command = f"# keep in torch.float32 what is made at {sites}"
    if source is not None:
        command = f"# compute what overflows in float32; this lists the sites: {again('repair', source, '--json')}"
    return of_remedy(keeping_in_float32(seen, situation.reproduction.dtype), command, _tokens(situation))


def _tokens(situation: Situation) -> int:
    return max((one.positions or 1 for one in situation.low), default=1)
