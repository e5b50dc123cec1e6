"""The logits of a run, among its records."""

from stabilitykit.diagnosis.parts import LOGITS, is_head
from stabilitykit.records import Record, Recording


def logits_of(recording: Recording, step: int = 0) -> Record | None:
    """The logits of a step: what the head made, after a soft-cap if there is one. None where there is no head."""
    of_step = [r for r in recording if r.step == step and not r.is_gradient]
    made = [at for at, r in enumerate(of_step) if is_head(r.site) or r.label in LOGITS]
    if not made:
        return None
    head, later = of_step[made[-1]], of_step[made[-1] + 1 :]
    if not is_head(head.site):
        return head
    capped = [r.operator for r in later[:3]] == ["div", "tanh", "mul"] and later[2].elements == head.elements
    if capped:
        return later[2]
    returned = (r for r in later if r.site.endswith("/output") and r.elements == head.elements)
    return next(returned, head)
