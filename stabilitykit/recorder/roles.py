"""What attention uses a tensor for: by the projection it comes from, and by what is done with it."""

from functools import cache

from stabilitykit.models.operators import CONTRACTIONS
from stabilitykit.recorder.masks import Call
from stabilitykit.recorder.origins import Role

_PROJECTIONS: dict[str, Role] = {
    "q_proj": "query",
    "q_norm": "query",
    "query_norm": "query",
    "query": "query",
    "k_proj": "key",
    "k_norm": "key",
    "key_norm": "key",
    "key": "key",
    "v_proj": "value",
    "v_norm": "value",
    "value": "value",
}


@cache
def role_of_module(path: str) -> Role | None:
    """The role of what is made inside the module of this path."""
    return _PROJECTIONS.get(path.rpartition(".")[2])


def role_of(call: Call, module: Role | None, *, scores: bool) -> Role | None:
    """The role of what `call` makes in a module whose own role is `module`. `scores`: it is a product of two computed
    tensors, or made of one element by element.
    """
    if module is not None:
        return module
    if scores:
        if call.name == "softmax":
            return "probabilities"
        return "probabilities" if any(o.origin.role == "probabilities" for o in call.operands) else "scores"
    if call.name in CONTRACTIONS:
        return None
    return next((o.origin.role for o in call.operands if o.origin.role in ("query", "key", "value")), None)
