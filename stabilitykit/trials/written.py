"""What the projections of a model write, and the parameters that it is made with."""

import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.diagnosis.parts import is_norm
from stabilitykit.diagnosis.projections import FUSED, NORMS, OUTPUTS, PROJECTIONS, Attended
from stabilitykit.recorder.names import site_path
from stabilitykit.records.scaling import Factor


@dataclass(frozen=True, slots=True)
class Written:
    """What a module writes, a projection or a norm's gain. `weight` and `bias` are the names of its parameters.

    Of a fused projection, block `at` of those of the `sizes`, which follow on each other `groups` times; `dim` is the
    dimension of the weight along which they do.
    """

    path: str
    sizes: tuple[int, ...] = ()
    at: int = 0
    groups: int = 1
    dim: int = 0
    weight: str = "weight"
    bias: str = "bias"

    def factor(self, exponent: int, dim: int, added: float = 0.0) -> Factor:
        """2^exponent for what is written, along dimension `dim` of a parameter; the rest of a fused one stays."""
        if not self.sizes:
            return Factor(exponents=(exponent,), added=added)
        exponents = tuple(exponent if at == self.at else 0 for at in range(len(self.sizes)))
        return Factor(exponents=exponents * self.groups, ends={dim: tuple(accumulate(self.sizes * self.groups))})

    def has(self, channel: int) -> bool:
        """Whether this channel of what the module returns belongs to it."""
        place = channel % sum(self.sizes) if self.sizes else 0
        return not self.sizes or self._start <= place < self._start + self.sizes[self.at]

    def of(self, output: Tensor) -> Tensor:
        """Its part of what the module returns [..., all channels]: [..., its own]."""
        if not self.sizes:
            return output
        groups = output.reshape(*output.shape[:-1], self.groups, -1)
        return groups.narrow(-1, self._start, self.sizes[self.at]).flatten(-2)

    @property
    def _start(self) -> int:
        return sum(self.sizes[: self.at])


class Projections:
    """Those of one model. Paths are as sites have them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {site_path(name): one for name, one in model.named_modules()}
        self.paths = {site_path(name): name for name, _ in model.named_modules()}
        self._names = {site_path(name): name for name, _ in model.named_parameters()}

    def attention(self, path: str) -> str | None:
        """The innermost module around `path` whose own projections make queries."""
        while path:
            if any(f"{path}.{name}" in self.modules for name in (*PROJECTIONS["query"], *FUSED)):
                return path
            path = path.rpartition(".")[0]
        return None

    def attended(self, attention: str, part: Attended) -> Written | None:
        """What makes the queries, keys or values of an attention: the gain of a norm, where one follows."""
        for name in NORMS[part]:
            if not isinstance(self.modules.get(f"{attention}.{name}"), nn.Identity | None):
                return Written(f"{attention}.{name}")
        for name in PROJECTIONS[part]:
            if f"{attention}.{name}" in self.modules:
                return Written(f"{attention}.{name}")
        for name in FUSED:
            fused = self.modules.get(f"{attention}.{name}")
            if fused is not None:
                own = getattr(fused, "base_layer", fused)  # below an adapter
                return _block(f"{attention}.{name}", own, self.modules[attention], part)
        return None

    def output(self, attention: str) -> Written | None:
        """The projection that reads the values of an attention."""
        outer = attention.rpartition(".")[0]
        paths = [f"{attention}.{name}" for name in OUTPUTS] + [f"{outer}.output.dense"]
        return next((Written(path) for path in paths if path in self.modules), None)

    def fused_up(self, mlp: str) -> Written | None:
        """The half of a fused `gate_up_proj` that is multiplied by the gate: of a layer's, or of its experts'."""
        module: Any = self.modules.get(mlp)
        fused, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if isinstance(fused, nn.Linear):
            half = fused.out_features // 2
            return Written(f"{mlp}.gate_up_proj", (half, half), 1)
        if isinstance(fused, nn.Parameter) and isinstance(down, nn.Parameter) and fused.shape[1] == 2 * down.shape[2]:
            half = down.shape[2]
            return Written(mlp, (half, half), 1, dim=1, weight="gate_up_proj", bias="")
        return None

    def factors(self, written: Written, exponent: int, *, bias: bool) -> dict[str, Factor]:
        """What multiplies its weight, its `bias` if that is to be too, and what adapters add to it; {} where it has no
        weight.
        """
        path = written.path.removesuffix(".base_layer")
        base = path if f"{path}.base_layer" not in self.modules else f"{path}.base_layer"
        weight = self._names.get(f"{base}.{written.weight}")
        if weight is None:
            return {}
        found = {weight: written.factor(exponent, written.dim, _added(self.modules[base], base))}
        added = self._names.get(f"{base}.{written.bias}")
        if added is not None and bias:
            found[added] = written.factor(exponent, 0)
        for site, name in self._names.items():
            if site.startswith(f"{path}.lora_B."):
                found[name] = written.factor(exponent, 0)
        return found


def both(first: dict[str, Factor], second: dict[str, Factor]) -> dict[str, Factor]:
    """All of these factors; blocks of a fused projection are multiplied in one go."""
    made = first | second
    for name in first.keys() & second.keys():
        exponents = zip(first[name].exponents, second[name].exponents, strict=True)
        made[name] = replace(first[name], exponents=tuple(map(sum, exponents)))
    return made


def _block(path: str, fused: nn.Module, attention: nn.Module, part: Attended) -> Written | None:
    """Where a fused projection keeps its queries, keys or values; None where it is not known for certain."""
    laid_out = _layout(path.rpartition(".")[2], fused, attention)
    if laid_out is None:
        return None
    sizes, groups = laid_out
    is_transposed = not isinstance(fused, nn.Linear)  # Conv1D of transformers
    return Written(path, sizes, ("query", "key", "value").index(part), groups, dim=1 if is_transposed else 0)


def _layout(name: str, fused: Any, attention: Any) -> tuple[tuple[int, int, int], int] | None:
    """How many queries, keys and values follow on each other, and how often they do."""
    config = getattr(attention, "config", None)
    size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    if name == "c_attn":
        if type(fused).__name__ != "Conv1D" or fused.weight.shape[1] != 3 * fused.weight.shape[0]:
            return None
        third = fused.weight.shape[0]
        return (third, third, third), 1
    if not isinstance(fused, nn.Linear) or not isinstance(size, int):
        return None
    every = fused.out_features
    if name == "query_key_value":
        if getattr(attention, "new_decoder_architecture", False):  # Falcon: each key follows the queries that share it
            groups = attention.num_kv_heads
            return (every // groups - 2 * size, size, size), groups
        if getattr(attention, "multi_query", False):
            return (every - 2 * size, size, size), 1
        heads = int(getattr(attention, "num_heads", 0) or getattr(config, "num_attention_heads", 0))
        return ((size, size, size), heads) if every == 3 * heads * size else None
    keys = size * getattr(attention, "num_key_value_heads", 0)
    if not keys:
        return ((every // 3,) * 3, 1) if name == "Wqkv" and every == 3 * fused.in_features else None
    return (every - 2 * keys, keys, keys), 1


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
