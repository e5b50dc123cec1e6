"""A power of two moved from one projection to the one that reads its result: what is between them becomes smaller."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from stabilitykit.diagnosis.parts import Part, is_activation, is_norm
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.recorder.names import site_path
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.trials.attributes import attribute
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.situation import NUMBER, Situation
from stabilitykit.words import listed

_QUERY, _KEY, _VALUE = (
    ("q_proj", "query", "q", "to_q", "q_lin", "query_proj"),
    ("k_proj", "key", "k", "to_k", "k_lin", "key_proj"),
    ("v_proj", "value", "v", "to_v", "v_lin", "value_proj"),
)
_ROLES: dict[Part, tuple[int, tuple[str, ...], str]] = {
    "query": (0, _QUERY, "q_norm"),
    "key": (1, _KEY, "k_norm"),
    "value": (2, _VALUE, "v_norm"),
}
_OUTPUTS = ("o_proj", "out_proj", "dense", "o", "c_proj", "proj", "wo", "to_out.0", "out_lin")
_SCALES = ("scaling", "scale")
_UP = ("up_proj", "wi_1", "w3")
_ADAPTER = ".lora_"


def factors(situation: Situation) -> Iterator[Candidate]:
    """For products of a gate and something else, for queries, keys and values, and for what only a norm reads."""
    if situation.reproduction.dtype != "float16" or situation.kind not in ("overflow", "reduction"):
        return
    found = _Factors(situation)
    match found.part():
        case "gate-up" | "up":
            yield from found.up_and_down()
        case "query" | "key":
            yield from found.query_and_key()
        case "scores":
            yield from found.query_and_scale("query")
        case "value" | "cache":
            yield from found.value_and_output()
        case "before-norm":
            yield from found.before_norm()


@dataclass(frozen=True, slots=True)
class _Written:
    """What a module writes, a projection or a norm's gain; of a fused one the block `at` of those that end at `ends`,
    along `dim` of its weight. `weight` and `bias` are the names of its parameters.
    """

    path: str
    ends: tuple[int, ...] = ()
    at: int = 0
    dim: int = 0
    weight: str = "weight"
    bias: str = "bias"

    def factor(self, exponent: int, dim: int, added: float = 0.0) -> Factor:
        if not self.ends:
            return Factor(exponents=(exponent,), added=added)
        exponents = tuple(exponent if at == self.at else 0 for at in range(len(self.ends)))
        return Factor(exponents=exponents, ends={dim: self.ends})


class _Factors:
    """The pairs of one situation, in every layer that overflows alike."""

    def __init__(self, situation: Situation) -> None:
        assert situation.broke is not None
        assert situation.place is not None
        self.situation = situation
        self.broke, self.place = situation.broke, situation.place
        self.modules: dict[str, nn.Module] = {site_path(name): one for name, one in situation.model.named_modules()}
        self.names = {site_path(name): name for name, _ in situation.model.named_parameters()}
        self.paths = {site_path(name): name for name, _ in situation.model.named_modules()}
        base, adapter, _ = self.broke.site.partition(_ADAPTER)
        self.adapted = base if adapter else None  # the projection that an adapter is on, where that is what broke

    def part(self) -> Part | None:
        """What broke, as far as paths say more than the records: of adapters, gains and fused projections."""
        if self.adapted is not None:
            return "up" if self.adapted.rpartition(".")[2] in _UP else self.situation.part
        last = self.broke.module.rpartition(".")[2]
        if last in ("q_norm", "k_norm") and (self.broke.site == self.broke.module or self.broke.operator == "mul"):
            return "query" if last == "q_norm" else "key"
        if last in ("c_attn", "qkv_proj") and self.broke.broke is not None:
            for part in _ROLES:
                own = self.role(part)
                if own is not None and own.ends and self.broke.broke.index[-1] < own.ends[own.at]:
                    return part
        return self.situation.part

    # what is offered

    def up_and_down(self) -> Iterator[Candidate]:
        up = self.up()
        if up is None:
            return
        later = (r.site for r in self.place.after if r.operator == "matmul" and "/" not in r.site)
        down = next((site for site in later if _ADAPTER not in site and not site.startswith(up.path)), None)
        if up.weight == "gate_up_proj":
            last = _Written(up.path, weight="down_proj", bias="")
        elif down is None:
            return
        else:
            last = _Written(down)
        yield from self.candidate("up and down factors", up, last, reads=True)

    def query_and_key(self) -> Iterator[Candidate]:
        part = self.part()
        assert part is not None
        other: Part = "key" if part == "query" else "query"
        own, partner = self.role(part), self.role(other)
        if own is None or partner is None:
            return
        if self.holds(partner):
            yield from self.candidate("query and key factors", own, partner, reads=False)
        else:
            yield from self.query_and_scale(part)

    def query_and_scale(self, part: Part) -> Iterator[Candidate]:
        """With the scale of the scores, where the attention keeps it."""
        attention, own = self.attention(), self.role(part)
        if attention is None or own is None:
            return
        name = next((one for one in _SCALES if isinstance(getattr(self.modules[attention], one, None), float)), None)
        if name is None or not self.fits(getattr(self.modules[attention], name)):
            return
        parameters: dict[str, Factor] = {}
        scales: dict[str, int] = {}
        for numbers, k in self.layers():
            parameters |= self.parameters(self.moved(own, numbers), -k, with_bias=True)
            scales[self.paths[self.renumbered(attention, numbers)]] = k
        shown = [f"{path} by 2^{_exponent(one)}" for path, one in parameters.items()]
        k = next(iter(scales.values()))
        yield Candidate(
            name="query and key factors",
            summary=f"Multiplies {listed(shown, 2)}, and the scale of {listed(list(scales), 2)} by 2^{k}: scores are "
            "smaller before they are scaled, and the same after that.",
            command="\n".join(
                [*(self.command(path, one) for path, one in parameters.items())]
                + [f"model.get_submodule({path!r}).{name} *= 2.0**{k}" for path, k in scales.items()]
            ),
            scaling=Scaling(parameters=parameters),
            around=partial(_times, {path: {name: k} for path, k in scales.items()}),
        )

    def value_and_output(self) -> Iterator[Candidate]:
        attention, own = self.attention(), self.role("value")
        if attention is None or own is None or is_norm(own.path):
            return
        if self.situation.part == "cache" and self.broke.broke and own.path not in self.broke.broke.operand_sites:
            return  # keys, or what is neither
        outer = attention.rpartition(".")[0]
        paths = [f"{attention}.{name}" for name in _OUTPUTS] + [f"{outer}.output.dense"]
        output = next((path for path in paths if path in self.modules), None)
        if output is not None:
            yield from self.candidate("value and output factors", own, _Written(output), reads=True)

    def before_norm(self) -> Iterator[Candidate]:
        """What a projection writes, and the eps of the norm that reads it."""
        norm = self.place.norm
        module = None if norm is None else self.modules.get(norm)
        if norm is None or module is None:
            return
        names = [name for name, value in vars(module).items() if isinstance(value, float) and "eps" in name]
        parameters: dict[str, Factor] = {}
        settings: dict[str, dict[str, int]] = {}
        for numbers, k in self.layers():
            own = self.parameters(_Written(self.renumbered(self.broke.module, numbers)), -k, with_bias=True)
            reads = self.paths.get(self.renumbered(norm, numbers))
            if own and reads is not None:
                parameters |= own
                settings[reads] = dict.fromkeys(names, -2 * k)
        if not parameters:
            return
        shown = [f"{path} by 2^{_exponent(one)}" for path, one in parameters.items()]
        yield Candidate(
            name="projection and eps factors",
            summary=f"Multiplies {listed(shown, 2)}, and the eps of {listed(list(settings), 2)} by the square of that: "
            "what the norm returns stays.",
            command="\n".join(
                [self.command(path, one) for path, one in parameters.items()]
                + [
                    f"model.get_submodule({path!r}).{name} *= 2.0**{k}"
                    for path, own in settings.items()
                    for name, k in own.items()
                ]
            ),
            scaling=Scaling(parameters=parameters),
            around=partial(_times, settings),
        )

    def candidate(self, name: str, first: _Written, second: _Written, *, reads: bool) -> Iterator[Candidate]:
        """`reads`: the second one is given what the first one wrote, so that its bias stays."""
        parameters: dict[str, Factor] = {}
        for numbers, k in self.layers():
            less = self.parameters(self.moved(first, numbers), -k, with_bias=True)
            more = self.parameters(self.moved(second, numbers), k, with_bias=not reads)
            if not less or not more or parameters.keys() & (less | more):
                return
            parameters |= less | more
        shown = [f"{path} by 2^{_exponent(one)}" for path, one in parameters.items()]
        yield Candidate(
            name=name,
            summary=f"Multiplies {listed(shown, 4)}: what is between them becomes smaller, and their result stays.",
            command="\n".join(self.command(path, one) for path, one in parameters.items()),
            scaling=Scaling(parameters=parameters),
            carried=True,
        )

    # where projections are

    def up(self) -> _Written | None:
        record = self.broke
        if self.adapted is not None:
            return _Written(self.adapted)
        if "/" not in record.site:
            return _Written(record.site)
        sites = () if record.broke is None else record.broke.operand_sites
        up = next((site for site in sites if not is_activation(site) and "/" not in site), None)
        if up is not None and up.rpartition(".")[2] != "gate_up_proj":
            return _Written(up)
        module: Any = self.modules.get(record.module)
        fused = getattr(module, "gate_up_proj", None)
        if isinstance(fused, nn.Linear):
            half = fused.out_features // 2
            return _Written(f"{record.module}.gate_up_proj", (half, 2 * half), 1)
        down = getattr(module, "down_proj", None)
        if isinstance(fused, nn.Parameter) and isinstance(down, nn.Parameter) and fused.shape[1] == 2 * down.shape[2]:
            half = down.shape[2]
            return _Written(record.module, (half, 2 * half), 1, dim=1, weight="gate_up_proj", bias="")
        return None

    def attention(self) -> str | None:
        """The module whose own projections make queries, keys and values."""
        path = self.broke.module
        while path:
            own = [name for name in (*_QUERY, "c_attn", "qkv_proj") if f"{path}.{name}" in self.modules]
            if own:
                return path
            path = path.rpartition(".")[0]
        return None

    def role(self, part: Part) -> _Written | None:
        """What writes queries, keys or values: the norm's gain where one follows the projection."""
        attention = self.attention()
        if attention is None:
            return None
        at, names, norm = _ROLES[part]
        if f"{attention}.{norm}" in self.modules and not isinstance(self.modules[f"{attention}.{norm}"], nn.Identity):
            return _Written(f"{attention}.{norm}")
        for name in names:
            if f"{attention}.{name}" in self.modules:
                return _Written(f"{attention}.{name}")
        fused: Any = self.modules.get(f"{attention}.c_attn")
        if (
            fused is not None
            and type(fused).__name__ == "Conv1D"
            and fused.weight.shape[1] == 3 * fused.weight.shape[0]
        ):
            third = fused.weight.shape[0]
            return _Written(f"{attention}.c_attn", (third, 2 * third, 3 * third), at, dim=1)
        module: Any = self.modules[attention]
        fused = self.modules.get(f"{attention}.qkv_proj")
        if isinstance(fused, nn.Linear) and hasattr(module, "head_dim") and hasattr(module, "num_key_value_heads"):
            each = module.num_key_value_heads * module.head_dim
            queries = fused.out_features - 2 * each
            return _Written(f"{attention}.qkv_proj", (queries, queries + each, queries + 2 * each), at)
        return None

    def holds(self, partner: _Written) -> bool:
        """Whether what the partner writes stays in range once it is larger."""
        form = number_format(self.situation.reproduction.dtype)
        more = dict(self.layers_of(partner))
        return all(form.headroom(one.amax or 0.0) > more[one.site] for one in self.situation.wide if one.site in more)

    def fits(self, scale: float) -> bool:
        """Whether what broke does not overflow once it is scaled."""
        return all(form.headroom(largest * scale) > 0 for form, largest in self.largest().values())

    # the layers that overflow alike

    def layers(self) -> Iterator[tuple[Sequence[str], int]]:
        """The numbers in each one's path, and the halvings that bring it into range, with a bit to spare."""
        for site, (form, largest) in self.largest().items():
            bits = -form.headroom(largest) if largest else 0.0
            yield NUMBER.findall(site), max(1, math.ceil(bits) + 1)

    def largest(self) -> dict[str, tuple[NumberFormat, float]]:
        """By site, the format that cannot hold it, and the largest magnitude that is known of it."""
        form = number_format(self.broke.dtype if self.situation.part == "cache" else self.situation.reproduction.dtype)
        broke = self.broke.broke
        value = None if broke is None else broke.value
        found: dict[str, tuple[NumberFormat, float]] = {}
        for site in self.situation.alike():
            record = self.situation.overflowing.get(site, self.broke)
            known = abs(value) if site == self.broke.site and value is not None and math.isfinite(value) else 0.0
            found[site] = form, max(record.amax or 0.0, known)
        return found

    def layers_of(self, written: _Written) -> Iterator[tuple[str, int]]:
        for numbers, k in self.layers():
            yield self.renumbered(written.path, numbers), k

    def renumbered(self, path: str, numbers: Sequence[str]) -> str:
        """`path`, beside what broke, in the layer with these numbers."""
        old, place = NUMBER.findall(self.broke.site), iter(range(len(numbers)))

        def change(found: Any) -> str:
            at = next(place, None)
            return numbers[at] if at is not None and old[at] == found.group() else str(found.group())

        return NUMBER.sub(change, path)

    def moved(self, written: _Written, numbers: Sequence[str]) -> _Written:
        path = self.renumbered(written.path, numbers)
        return _Written(path, written.ends, written.at, written.dim, written.weight, written.bias)

    # its parameters

    def parameters(self, written: _Written, exponent: int, *, with_bias: bool) -> dict[str, Factor]:
        """The factors of what a module writes: its weight, its bias, and what adapters add to it."""
        path = written.path.removesuffix(".base_layer")
        base = path if f"{path}.base_layer" not in self.modules else f"{path}.base_layer"
        found: dict[str, Factor] = {}
        weight = self.names.get(f"{base}.{written.weight}")
        if weight is None:
            return {}
        found[weight] = written.factor(exponent, written.dim, _added(self.modules[base], base))
        bias = self.names.get(f"{base}.{written.bias}")
        if bias is not None and with_bias:
            found[bias] = written.factor(exponent, 0)
        for site, name in self.names.items():
            if site.startswith(f"{path}.lora_B."):
                found[name] = written.factor(exponent, 0)
        return found

    def command(self, path: str, factor: Factor) -> str:
        e = _exponent(factor)
        held = f"model.get_parameter({path!r}).data"
        if factor.added:
            return f"{held}.add_({factor.added:g}).mul_(2.0**{e}).sub_({factor.added:g})"
        for dim, ends in factor.ends.items():
            at = next(place for place, one in enumerate(factor.exponents) if one)
            block = f"{ends[at - 1] if at else 0}:{ends[at]}"
            return f"{held}[{':, ' * dim}{block}] *= 2.0**{e}"
        return f"{held} *= 2.0**{e}"


def _exponent(factor: Factor) -> int:
    return next((one for one in factor.exponents if one), 0)


def _added(module: nn.Module, path: str) -> float:
    """1 for the gain of a norm that multiplies by 1 + w: with w = 0 it does not return zeros."""
    weight: Any = getattr(module, "weight", None)
    if not is_norm(path) or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return 0.0
    with torch.no_grad():
        tried = copy.deepcopy(module).float()
        for one in tried.parameters():
            one.zero_()
        return 1.0 if bool(tried(torch.arange(1.0, len(weight) + 1, device=weight.device)[None]).any()) else 0.0


@contextmanager
def _times(settings: Mapping[str, Mapping[str, int]], model: nn.Module) -> Iterator[None]:
    """Multiplies what modules hold as attributes by powers of two: by path and name, the exponents."""
    with ExitStack() as stack:
        for path, own in settings.items():
            module = model.get_submodule(path)
            for name, exponent in own.items():
                stack.enter_context(attribute(module, name, getattr(module, name) * 2.0**exponent))
        yield
