"""A power of two moved from one projection to the one that reads its result: what is between them becomes smaller."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn

from stabilitykit.diagnosis.parts import is_activation, is_norm
from stabilitykit.formats import number_format
from stabilitykit.recorder.names import site_path
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import NUMBER, Situation
from stabilitykit.words import listed

_OUTPUTS = ("o_proj", "out_proj", "dense", "wo", "o", "c_proj", "proj", "to_out.0", "attention.output.dense")
_PARTNERS = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("q_norm", "k_norm"),
    ("q", "k"),
    ("to_q", "to_k"),
    ("q_lin", "k_lin"),
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def factors(situation: Situation) -> Iterator[Candidate]:
    """For products of a gate and something else, for queries, keys and values, and for what only a norm reads."""
    if situation.reproduction.dtype != "float16" or situation.kind not in ("overflow", "reduction"):
        return
    match situation.part:
        case "gate-up" | "up":
            yield from _candidate(situation, "up and down factors", _up_and_down(situation))
        case "query" | "key":
            yield from _candidate(situation, "query and key factors", _partners(situation))
        case "value":
            yield from _candidate(situation, "value and output factors", _value_and_output(situation))
        case "before-norm":
            yield from _before_norm(situation)


def _candidate(situation: Situation, name: str, pair: tuple[str, str] | None) -> Iterator[Candidate]:
    if pair is None:
        return
    exponents: dict[str, int] = {}
    known = {site_path(path): path for path, _ in situation.model.named_parameters()}
    for first, second, k in _in_each_layer(situation, pair):
        exponents |= {known[site]: -k for site in (f"{first}.weight", f"{first}.bias") if site in known}
        exponents |= {known[f"{second}.weight"]: k} if f"{second}.weight" in known else {}
    if not exponents:
        return
    shown = [f"{path} by 2^{e}" for path, e in exponents.items()]
    yield Candidate(
        name=name,
        summary=f"Multiplies {listed(shown, 4)}: what is between them becomes smaller, and their result stays.",
        command="\n".join(f"model.get_parameter({path!r}).data *= 2.0**{e}" for path, e in exponents.items()),
        scaling=Scaling(
            parameters={path: Factor(exponents=(e,), added=_added(situation, path)) for path, e in exponents.items()}
        ),
        carried=True,
    )


def _added(situation: Situation, path: str) -> float:
    """1 for the gain of a norm that multiplies by 1 + w, as Gemma's do."""
    module = situation.model.get_submodule(path.rpartition(".")[0])
    return 1.0 if "Gemma" in type(module).__name__ and is_norm(path.rpartition(".")[0]) else 0.0


def _in_each_layer(situation: Situation, pair: tuple[str, str]) -> Iterator[tuple[str, str, int]]:
    """The pair of each layer that overflows alike, and the halvings that bring it into range, with a bit to spare."""
    broke = situation.broke
    assert broke is not None
    form = number_format(situation.reproduction.dtype)
    for site in situation.alike():
        numbers = NUMBER.findall(site)
        first, second = (_renumbered(path, NUMBER.findall(broke.site), numbers) for path in pair)
        record = situation.overflowing.get(site, broke)
        largest = max(record.amax or 0.0, _value(situation) if site == broke.site else 0.0)
        bits = -form.headroom(largest) if largest else 0.0
        yield first, second, max(1, math.ceil(bits) + 1)


def _value(situation: Situation) -> float:
    broke = situation.broke
    value = None if broke is None or broke.broke is None else broke.broke.value
    return abs(value) if value is not None and math.isfinite(value) else 0.0


def _renumbered(path: str, old: Sequence[str], new: Sequence[str]) -> str:
    """`path` with the numbers of another layer, where they are those of the layer that broke."""
    changes: Mapping[str, str] = dict(zip(old, new, strict=True))
    return NUMBER.sub(lambda one: changes.get(one.group(), one.group()), path)


def _up_and_down(situation: Situation) -> tuple[str, str] | None:
    place = situation.place
    assert place is not None
    record = place.record
    down = next((r.site for r in place.after if r.operator == "matmul" and "/" not in r.site), None)
    if "/" not in record.site:
        return None if down is None else (record.site, down)
    sites = () if record.broke is None else record.broke.operand_sites
    up = next((site for site in sites if not is_activation(site) and "/" not in site), None)
    if up is None:  # fused gate and up: nothing to multiply alone
        return None
    return None if down is None else (up, down)


def _partners(situation: Situation) -> tuple[str, str] | None:
    broke = situation.broke
    assert broke is not None
    inside = _attention_of(broke.module)
    names = {site_path(name): name for name, _ in situation.model.named_modules()}
    order = _PARTNERS if situation.part == "query" else tuple((b, a) for a, b in _PARTNERS)
    normed = sorted(order, key=lambda pair: "norm" not in pair[0])
    for own, other in normed:
        if f"{inside}.{own}" in names and f"{inside}.{other}" in names:
            return f"{inside}.{own}", f"{inside}.{other}"
    return None


def _value_and_output(situation: Situation) -> tuple[str, str] | None:
    broke = situation.broke
    assert broke is not None
    inside = _attention_of(broke.module)
    names = {site_path(name): name for name, _ in situation.model.named_modules()}
    value = next(
        (f"{inside}.{own}" for own in ("v_proj", "value", "v", "to_v", "v_lin") if f"{inside}.{own}" in names), None
    )
    outer = inside.rpartition(".")[0]
    output = next(
        (
            f"{path}.{own}"
            for path in (inside, outer)
            for own in (*_OUTPUTS, "output.dense")
            if f"{path}.{own}" in names
        ),
        None,
    )
    return None if value is None or output is None else (value, output)


def _attention_of(path: str) -> str:
    """The outermost part of a path that is an attention's."""
    parts = path.split(".")
    found = [at for at, part in enumerate(parts) if _ATTENTION.search(part)]
    return ".".join(parts[: found[-1] + 1]) if found else path.rpartition(".")[0]


def _before_norm(situation: Situation) -> Iterator[Candidate]:
    """What a projection writes, and the eps of the norm that reads it."""
    place = situation.place
    assert place is not None
    own, norm = place.record.module, place.norm
    known = {site_path(path): path for path, _ in situation.model.named_parameters()}
    weights = [known[site] for site in (f"{own}.weight", f"{own}.bias") if site in known]
    module = None if norm is None else situation.module_at(norm)
    if not weights or module is None:
        return
    _, _, k = next(_in_each_layer(situation, (own, own)))
    names = [name for name, value in vars(module).items() if isinstance(value, float) and "eps" in name]
    yield Candidate(
        name="projection and eps factors",
        summary=f"Multiplies {listed(weights, 2)} by 2^-{k} and the eps of {norm} by 2^-{2 * k}: what the norm returns "
        "stays.",
        command="\n".join(
            [f"model.get_parameter({path!r}).data *= 2.0**-{k}" for path in weights]
            + [f"model.get_submodule({_path_of(situation.model, module)!r}).{name} *= 2.0**-{2 * k}" for name in names]
        ),
        scaling=Scaling(parameters={path: Factor(exponents=(-k,)) for path in weights}),
        around=partial(_smaller_eps, _path_of(situation.model, module), names, 2 * k),
    )


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(str(path) for path, one in model.named_modules() if one is module)


@contextmanager
def _smaller_eps(path: str, names: Sequence[str], halvings: int, model: nn.Module) -> Iterator[None]:
    module = model.get_submodule(path)
    before = {name: getattr(module, name) for name in names}
    for name, value in before.items():
        setattr(module, name, value * 2.0**-halvings)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
