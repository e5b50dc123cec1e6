"""What a tensor is for: by the projection that it comes from, and by what is done with it."""

from functools import cache

from stabilitykit.diagnosis.projections import NORMS, PROJECTIONS
from stabilitykit.models.operators import CONTRACTIONS
from stabilitykit.recorder.masks import Call
from stabilitykit.recorder.origins import Origin, Role

_PROJECTIONS: dict[str, Role] = {
    name: role for names in (PROJECTIONS, NORMS) for role, own in names.items() for name in own
}


_ATTENTION = frozenset({"query", "key", "value"})

# In a root mean square norm: what an operator makes of what.
_NORM: dict[tuple[str, Role], Role] = {
    ("cast", "given"): "given",
    ("pow", "given"): "squares",
    ("mul", "given"): "squares",
    ("mean", "squares"): "mean square",
    ("add", "mean square"): "mean square + eps",
    ("rsqrt", "mean square + eps"): "1 / root",
    ("pow", "mean square + eps"): "1 / root",
    ("mul", "1 / root"): "normalised",
    ("cast", "normalised"): "normalised",
}

_EXPONENTS: dict[Role, float] = {"squares": 2, "1 / root": -0.5}


@cache
def role_of_module(path: str) -> Role | None:
    """The role of what is made inside the module of this path."""
    return _PROJECTIONS.get(path.rpartition(".")[2])


@cache
def is_norm(path: str) -> bool:
    return path.endswith("norm")


def role_of(call: Call, module: Role | None, *, scores: bool, given: Origin | None = None) -> Role | None:
    """The role of what `call` makes in a module whose own role is `module`. `scores`: it is a product of two computed
    tensors, or made of one element by element. `given` is what a norm was given.
    """
    origins = [operand.origin for operand in call.operands]
    if given is not None and call.func is not None:
        roles = ["given" if origin is given else origin.role for origin in origins]
        for role in roles:
            found = None if role is None else _NORM.get((call.name, role))
            if call.name == "pow" and found is not None and call.args[1] != _EXPONENTS[found]:
                found = None
            if found is not None and (found != "squares" or len(set(roles)) == 1):
                return found
        if module is None:
            return None
    if module is not None:
        return module
    if scores:
        if call.name == "softmax":
            return "probabilities"
        return "probabilities" if any(origin.role == "probabilities" for origin in origins) else "scores"
    if call.name in CONTRACTIONS:
        return None
    attended = next((origin.role for origin in origins if origin.role in _ATTENTION), None)
    if attended is None and call.name == "mul" and len(origins) == 2:
        return "product" if all(origin.kind == "computed" for origin in origins) else None
    return attended
