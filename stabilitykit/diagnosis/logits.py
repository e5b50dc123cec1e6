"""The logits of a run, among its records."""

from stabilitykit.diagnosis.parts import LOGITS, is_head
from stabilitykit.records import Record, Recording


def logits_of(recording: Recording, step: int = 0) -> Record | None:
    """The logits of a step: what the head made, after a soft-cap if there is one. None where there is no head."""
    of_step = [r for r in recording if r.step == step]
    made = [at for at, r in enumerate(of_step) if is_head(r.site) or r.label in LOGITS]
    if not made:
        return None
    head = of_step[made[-1]]
    following = of_step[made[-1] + 1 : made[-1] + 4]
    capped = [r.operator for r in following] == ["div", "tanh", "mul"] and following[-1].shape == head.shape
    return following[-1] if capped and is_head(head.site) else head
