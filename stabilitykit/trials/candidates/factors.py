"""A power of two moved from one projection to the one that reads its result: what is between them becomes smaller."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.diagnosis.parts import Part, is_activation, is_norm, part_of
from stabilitykit.diagnosis.projections import DOWN, FUSED, NORMS, PROJECTIONS, Attended
from stabilitykit.formats import NumberFormat, number_format
from stabilitykit.recorder.record import unrecorded
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.remedies.places import scale_of
from stabilitykit.remedies.remedy import LeftOut
from stabilitykit.trials.answers import answers
from stabilitykit.trials.attributes import attribute
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.multiplied import lines, told
from stabilitykit.trials.recast import Recast
from stabilitykit.trials.situation import NUMBER, Situation, without_layers
from stabilitykit.trials.written import Projections, Written, both
from stabilitykit.words import listed

_UP_AND_DOWN = "up and down factors"
_QUERY_AND_KEY = "query and key factors"
_VALUE_AND_OUTPUT = "value and output factors"
_PROJECTION_AND_EPS = "projection and eps factors"

_ADAPTER = ".lora_"
_ROTATED = 0.5  # bits: RoPE makes of two numbers one of up to √2 times the larger

_Numbers = tuple[str, ...]
"""Those in the path of a module: of its layer, and of its expert."""


def factors(situation: Situation) -> Iterator[Candidate | LeftOut]:
    """For products of a gate and something else, for queries, keys and values, and for what only a norm reads."""
    if situation.reproduction.dtype != "float16" or situation.kind not in ("overflow", "reduction"):
        return
    found = _Factors(situation)
    match found.part():
        case "gate-up" | "up":
            yield from found.up_and_down()
        case "query":
            yield from found.query_and_key("query", "key")
        case "key":
            yield from found.query_and_key("key", "query")
        case "scores":
            yield from found.query_and_scale("query")
        case "value" | "cache":
            yield from found.value_and_output()
        case "before-norm":
            yield from found.before_norm()


class _Factors:
    """The pairs of one situation, in every layer that overflows alike."""

    def __init__(self, situation: Situation) -> None:
        assert situation.broke is not None
        assert situation.place is not None
        self.situation = situation
        self.broke, self.place = situation.broke, situation.place
        self.projections = Projections(situation.model)
        self.module = self.broke.module.removesuffix(".base_layer")  # the projection that an adapter is on
        self.attention = self.projections.attention(self.module)
        base, adapter, _ = self.broke.site.partition(_ADAPTER)
        self.adapted = base if adapter else None  # the same, where the adapter is what broke
        self.seen: dict[_Numbers, Tensor] = {}  # of a fused projection, what each channel reaches

    def part(self) -> Part | None:
        """What broke, as far as paths say more than the records: of adapters, gains and fused projections."""
        if self.adapted is not None:
            return "up" if self.adapted.rpartition(".")[2] in DOWN else self.situation.part
        last = self.module.rpartition(".")[2]
        if self.module != self.broke.module and last in DOWN:
            return "up"
        if self.broke.site == self.broke.module or self.broke.operator == "mul":
            for part in ("query", "key"):
                if last in NORMS[part]:
                    return part
        index = () if self.broke.broke is None else self.broke.broke.index
        if index and not is_norm(self.module) and self.situation.part != "before-norm":
            for part in PROJECTIONS:
                own = self.attended(part)
                if own is not None and own.path == self.module and own.has(index[-1]):
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
            last = Written(up.path, weight="down_proj", bias="")
        elif down is None:
            return
        else:
            last = Written(down)
        yield from self.pair(_UP_AND_DOWN, up, last, self.halvings(), reads=True)

    def query_and_key(self, part: Attended, other: Attended) -> Iterator[Candidate | LeftOut]:
        own, partner = self.attended(part), self.attended(other)
        if own is None or partner is None:
            return
        halvings = self.halvings(own)
        holds = self.holds(partner, halvings)
        if self.scores() or not holds:
            scaled = list(self.query_and_scale(part))
            if not holds or any(isinstance(one, Candidate) for one in scaled):
                yield from scaled
                return
        # scores that still overflow may do no harm: those that become -inf are zero after softmax
        yield from self.pair(_QUERY_AND_KEY, own, partner, halvings, reads=False)

    def query_and_scale(self, part: Attended) -> Iterator[Candidate | LeftOut]:
        """With the scale of the scores, where the attention keeps it: scores become smaller too."""
        own = self.attended(part)
        if self.attention is None or own is None:
            return
        scale = scale_of(self.projections.modules[self.attention])
        if scale is None:
            yield LeftOut(
                _QUERY_AND_KEY,
                "A factor that keys or queries take back leaves scores as large, or makes what takes it overflow, and "
                f"{self.attention} has no scale of its own that could take it.",
            )
            return
        large = self.scores()
        if not self.fits_scaled(large, scale):
            yield LeftOut(_QUERY_AND_KEY, "Scores overflow even after they are scaled.")
            return
        halvings = {numbers: self.needed(size) for numbers, size in large.items()}
        if self.part() != "scores":
            for numbers, k in self.halvings(own).items():
                halvings[numbers] = max(k, halvings.get(numbers, 0))
        parameters: dict[str, Factor] = {}
        scales: dict[str, dict[str, int]] = {}
        for numbers, k in halvings.items():
            parameters |= self.projections.factors(self.moved(own, numbers), -k, bias=True)
            scales[self.projections.paths[self.renumbered(self.attention, numbers)]] = {scale: k}
        k = next(iter(halvings.values()))
        yield Candidate(
            name=_QUERY_AND_KEY,
            summary=f"Multiplies {told(parameters, 2)}, and the scale of {listed(list(scales), 2)} by 2^{k}: scores "
            "are smaller before they are scaled, and the same after that.",
            command="\n".join([*lines(parameters), *_setting_lines(scales)]),
            scaling=Scaling(parameters=parameters),
            around=partial(_times, scales),
        )

    def value_and_output(self) -> Iterator[Candidate]:
        own = self.attended("value")
        if self.attention is None or own is None or is_norm(own.path):
            return
        if self.situation.part == "cache" and not self.caches(own):
            return
        output = self.projections.output(self.attention)
        if output is not None:
            yield from self.pair(_VALUE_AND_OUTPUT, own, output, self.halvings(own), reads=True)

    def caches(self, value: Written) -> bool:
        """Whether it is values that broke in a cache, and no keys: what was cast is theirs, or keys are smaller."""
        broke = self.broke.broke
        if broke is None or value.path in broke.operand_sites:
            return broke is not None
        largest = {one.site: one.amax or 0.0 for one in self.situation.low if one.step == self.broke.step}
        key = self.attended("key")
        keys = [size for site, size in largest.items() if key is not None and site.startswith(key.path)]
        lost = abs(broke.value or 0.0)
        return bool(keys) and 2.0**_ROTATED * max(keys) < lost <= largest.get(value.path, 0.0)

    def before_norm(self) -> Iterator[Candidate]:
        """What a projection writes, and the eps of the norm that reads it."""
        norm = self.place.norm
        module = None if norm is None else self.projections.modules.get(norm)
        if norm is None or module is None or self.module.rpartition(".")[2] in FUSED:  # only a part of it is normalised
            return
        names = [name for name, value in vars(module).items() if isinstance(value, float) and "eps" in name]
        parameters: dict[str, Factor] = {}
        settings: dict[str, dict[str, int]] = {}
        for numbers, k in self.halvings().items():
            own = self.projections.factors(Written(self.renumbered(self.broke.module, numbers)), -k, bias=True)
            reads = self.projections.paths.get(self.renumbered(norm, numbers))
            if own and reads is not None:
                parameters |= own
                settings[reads] = dict.fromkeys(names, -2 * k)
        if not parameters:
            return
        yield Candidate(
            name=_PROJECTION_AND_EPS,
            summary=f"Multiplies {told(parameters, 2)}, and the eps of {listed(list(settings), 2)} by the square of "
            "that: what the norm returns stays.",
            command="\n".join([*lines(parameters), *_setting_lines(settings)]),
            scaling=Scaling(parameters=parameters),
            around=partial(_times, settings),
        )

    def pair(
        self, name: str, first: Written, second: Written, halvings: Mapping[_Numbers, int], *, reads: bool
    ) -> Iterator[Candidate]:
        """`reads`: the second one is given what the first one wrote, so that its bias stays."""
        parameters: dict[str, Factor] = {}
        for numbers, k in halvings.items():
            less = self.projections.factors(self.moved(first, numbers), -k, bias=True)
            more = self.projections.factors(self.moved(second, numbers), k, bias=not reads)
            if not less or not more or parameters.keys() & (less | more):
                return
            parameters |= both(less, more)
        yield Candidate(
            name=name,
            summary=f"Multiplies {told(parameters, 4)}: what is between them becomes smaller, and their result stays.",
            command="\n".join(lines(parameters)),
            scaling=Scaling(parameters=parameters),
            carried=True,
        )

    # what it is offered for

    def up(self) -> Written | None:
        record = self.broke
        if self.adapted is not None:
            return Written(self.adapted)
        if "/" not in record.site:
            return Written(record.site)
        sites = () if record.broke is None else record.broke.operand_sites
        up = next((site for site in sites if not is_activation(site) and "/" not in site), None)
        if up is not None and up.rpartition(".")[2] != "gate_up_proj":
            return Written(up)
        return self.projections.fused_up(record.module)

    def attended(self, part: Attended) -> Written | None:
        return None if self.attention is None else self.projections.attended(self.attention, part)

    # how large it is

    def halvings(self, own: Written | None = None) -> dict[_Numbers, int]:
        """Of each layer that overflows alike, those that bring it into range; of a fused projection, only `own` part of
        it.
        """
        broke = self.broke.broke
        known = 0.0 if broke is None or broke.value is None or not math.isfinite(broke.value) else abs(broke.value)
        here, found = _numbers(self.broke.site), dict[_Numbers, int]()
        is_output = own is not None and own.path == self.module and own.weight == "weight"  # experts return a sum
        channels = self.channels(own.path) if own is not None and own.sizes and is_output else {}
        for site in self.situation.alike():
            numbers = _numbers(site)
            record = self.situation.overflowing.get(site, self.broke)
            size = (record.amax or 0.0) if not channels or own is None else _largest(own, channels, numbers)
            if numbers == here:
                size = max(size, known)
            elif channels and self.form.headroom(size) > 0:
                continue  # another part of it overflows
            found[numbers] = max(found.get(numbers, 0), self.needed(size))
        return found

    def needed(self, size: float) -> int:
        """The halvings that bring it into range, with a bit to spare."""
        return max(1, math.ceil(-self.form.headroom(size) if size else 0.0) + 1)

    @property
    def form(self) -> NumberFormat:
        """The format that cannot hold what broke."""
        is_cache = self.situation.part == "cache"
        return number_format(self.broke.dtype if is_cache else self.situation.reproduction.dtype)

    def holds(self, partner: Written, halvings: Mapping[_Numbers, int]) -> bool:
        """Whether what the partner writes stays in range once it is larger."""
        wide = self.situation.wide
        channels = self.channels(partner.path) if partner.sizes else {}
        for numbers, k in halvings.items():
            path = self.renumbered(partner.path, numbers)
            sizes = [one.amax or 0.0 for one in wide if one.site == path]
            if channels:
                sizes = [_largest(partner, channels, numbers)]
            if any(self.form.headroom(size) <= k + _ROTATED for size in sizes if size):
                return False
        return True

    def scores(self) -> dict[_Numbers, float]:
        """Those that overflow before they are scaled, in attentions called alike: the largest of each layer."""
        found: dict[_Numbers, float] = {}
        if self.attention is None:
            return found
        pattern = without_layers(self.attention)
        for one in self.situation.overflowing.values():
            if without_layers(one.module) == pattern and part_of(self.situation.wide, one) == "scores":
                found[_numbers(one.site)] = max(found.get(_numbers(one.site), 0.0), one.amax or 0.0)
        broke = self.broke.broke
        if self.part() == "scores" and broke is not None:
            value = 0.0 if broke.value is None or not math.isfinite(broke.value) else abs(broke.value)
            found[_numbers(self.broke.site)] = max(found.get(_numbers(self.broke.site), 0.0), value)
        return found

    def fits_scaled(self, scores: Mapping[_Numbers, float], scale: str) -> bool:
        assert self.attention is not None
        for numbers, size in scores.items():
            by = getattr(self.projections.modules[self.renumbered(self.attention, numbers)], scale)
            if size and self.form.headroom(size * by) <= 0:
                return False
        return True

    def channels(self, path: str) -> dict[_Numbers, Tensor]:
        """What each channel of a fused projection reaches in float32, in each layer that overflows alike: records have
        one number for all.
        """
        if not self.seen:
            models = self.situation.models
            wide = models.model("float32")
            modules = Projections(wide).modules
            layers = {numbers: self.renumbered(path, numbers) for numbers in map(_numbers, self.situation.alike())}
            watched = {numbers: modules[one] for numbers, one in layers.items() if one in modules}
            answers(models.of, wide, around=_watched(watched, self.seen), recast=Recast(torch.float32))
        return self.seen

    # in other layers

    def renumbered(self, path: str, numbers: _Numbers) -> str:
        """`path`, beside what broke, in the layer with these numbers."""
        old, place = _numbers(self.broke.site), iter(range(len(numbers)))

        def change(found: Any) -> str:
            at = next(place, None)
            return numbers[at] if at is not None and old[at] == found.group() else str(found.group())

        return NUMBER.sub(change, path)

    def moved(self, written: Written, numbers: _Numbers) -> Written:
        return replace(written, path=self.renumbered(written.path, numbers))


def _numbers(site: str) -> _Numbers:
    return tuple(NUMBER.findall(site.partition("/")[0]))


def _largest(written: Written, channels: Mapping[_Numbers, Tensor], numbers: _Numbers) -> float:
    return float(written.of(channels[numbers]).max()) if numbers in channels else 0.0


@contextmanager
def _watched(modules: Mapping[_Numbers, nn.Module], seen: dict[_Numbers, Tensor]) -> Iterator[None]:
    """Keeps the largest finite magnitude of each channel of what these modules return."""

    def look(numbers: _Numbers, module: nn.Module, args: Any, output: Tensor) -> None:
        with unrecorded():
            sizes = output.detach().float().abs().nan_to_num(0.0, posinf=0.0).flatten(0, -2).amax(0)
            seen[numbers] = torch.maximum(seen[numbers], sizes) if numbers in seen else sizes

    with ExitStack() as stack:
        for numbers, module in modules.items():
            stack.callback(module.register_forward_hook(partial(look, numbers)).remove)
        yield


def _setting_lines(settings: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [
        f"model.get_submodule({path!r}).{name} *= 2.0**{k}" for path, own in settings.items() for name, k in own.items()
    ]


@contextmanager
def _times(settings: Mapping[str, Mapping[str, int]], model: nn.Module) -> Iterator[None]:
    """Multiplies what modules hold as attributes by powers of two: by path and name, the exponents."""
    with ExitStack() as stack:
        for path, own in settings.items():
            module = model.get_submodule(path)
            for name, exponent in own.items():
                stack.enter_context(attribute(module, name, getattr(module, name) * 2.0**exponent))
        yield
