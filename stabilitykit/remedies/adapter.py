"""A LoRA adapter of peft's, scaled with the model it was trained on: base and adapter compute what they did.

A module with the weight W computes (W + s B A) x. Where W is multiplied by 2^r in some rows and 2^c in some columns, so
must B A be: the rows of B by 2^r, the columns of A by 2^c, and the scale s stays. What an adapter replaces or adds to
(embeddings of new tokens, biases, modules trained whole, the magnitudes of DoRA) is multiplied like what it replaces.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.checkpoints.huggingface import tensors_of, weight_files
from stabilitykit.checkpoints.safetensors_writer import Written, write_safetensors
from stabilitykit.errors import CheckpointError, MisuseError
from stabilitykit.models.transformers.plain import load_placeholders
from stabilitykit.models.transformers.stored_names import ONE, by_every_name, placeholders
from stabilitykit.records.scaling import Factor, Scaling
from stabilitykit.scaling.apply import scaled

_CONFIG, _WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
# Settings under which an adapter's tensors mean something else.
_REFUSED = ("use_qalora", "use_bdlora", "target_parameters", "layer_replication", "kasa_config", "arrow_config")


def write_scaled_adapter(
    adapter: Path,
    source: Path,
    scaling: Scaling,
    folder: Path,
    *,
    base: str | None = None,
    kind: Any = None,
    trust_remote_code: bool = False,
) -> tuple[str, ...]:
    """Writes the adapter in `adapter`, of the model in `source`, into the empty `folder`; returns what was scaled.

    `scaling` is the one that `source` gets. `base` is the name that the adapter's config is to give its base model,
    None keeps the one it has. Tensors stay in their dtypes, but for those whose scaled numbers only float32 can hold.

    Raises MisuseError for a folder without an adapter, and CheckpointError, by name, for an adapter of another kind
    than LoRA and for tensors that cannot follow the scaling: whose parameter is not found, or whose blocks do not split
    into rows and columns.
    """
    settings = _read_settings(adapter)
    weights = next((adapter / name for name in _WEIGHTS if (adapter / name).is_file()), None)
    if weights is None:
        raise MisuseError(f"{adapter} has no {' or '.join(_WEIGHTS)}, so there are no weights to scale.")
    files = [tensors_of(path) for path in weight_files(source)]
    stored = {name: tensor for held in files for name, tensor in held.items()}
    blank = placeholders({name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()})
    model = load_placeholders(source, blank, torch.float32, kind=kind, trust_remote_code=trust_remote_code)
    names = _Names(model=model, factors=by_every_name(model, stored, scaling.parameters))

    made: dict[str, Tensor] = {}
    changed = []
    for name, tensor in tensors_of(weights).items():
        factor = _factor(name, tensor, names)
        made[name] = _exact(name, tensor, factor)
        if any(factor.exponents):
            changed.append(name)
    written = [Written(name=name, dtype=one.dtype, shape=one.shape, pieces=_whole(one)) for name, one in made.items()]
    write_safetensors(folder / _WEIGHTS[0], written, {"format": "pt"})
    if base is not None:
        settings["base_model_name_or_path"] = base
    (folder / _CONFIG).write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    for path in sorted(adapter.iterdir()):
        if path.is_file() and path.name not in (_CONFIG, *_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    return tuple(changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """A base model without values, and the factor of everything in it, by each of its names."""

    model: nn.Module
    factors: Mapping[str, Factor]

    def of(self, path: str, asked_by: str) -> Factor:
        if path not in self.factors:
            raise CheckpointError(
                f"{asked_by} belongs to {path}, which the base model does not have. Is it another model's adapter?"
            )
        return self.factors[path]

    def is_transposed(self, path: str) -> bool:
        """Whether a module keeps its weight as [in, out], as those of GPT-2 do."""
        return type(self.model.get_submodule(path)).__name__ == "Conv1D"


def _read_settings(adapter: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((adapter / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MisuseError(f"{adapter} has no {_CONFIG} that can be read, so it is no adapter's folder.") from None
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{adapter} holds an adapter of the kind {settings.get('peft_type')}; only LoRA is scaled."
        )
    odd = [name for name in _REFUSED if settings.get(name)]
    if odd:
        raise CheckpointError(f"{adapter}: how LoRA with {' and '.join(odd)} follows a scaling is not known.")
    return settings


def _factor(name: str, tensor: Tensor, names: _Names) -> Factor:
    """What a tensor of the adapter is multiplied by."""
    inner = name.removeprefix(_PREFIX)
    for ending, rule in _RULES.items():
        if inner.endswith(ending):
            return rule(inner.removesuffix(ending), name, names)
    if "lora_" in inner or "token_adapter" in inner:
        raise CheckpointError(f"How {name} follows a scaling of its base model is not known.")
    return names.of(inner.replace(".base_layer.", ".").replace(".original_module.", "."), name)


def _rows(path: str, name: str, names: _Names) -> Factor:
    """lora_B, [out, r]."""
    rows, columns = _split(names.of(f"{path}.weight", name), path)
    return columns if names.is_transposed(path) else rows


def _columns(path: str, name: str, names: _Names) -> Factor:
    """lora_A, [r, in]: the factor of its columns."""
    rows, columns = _split(names.of(f"{path}.weight", name), path)
    found = rows if names.is_transposed(path) else columns
    return _along(1, found)


def _embedding_rows(path: str, name: str, names: _Names) -> Factor:
    """lora_embedding_B, [width, r]: that of the columns of the embedding, [tokens, width], which adds (B A)ᵀ."""
    rows, columns = _split(names.of(f"{path}.weight", name), path)
    return columns if rows.ends else replace(columns, exponents=tuple(e + rows.exponents[0] for e in columns.exponents))


def _embedding_columns(path: str, name: str, names: _Names) -> Factor:
    """lora_embedding_A, [r, tokens]."""
    rows, _ = _split(names.of(f"{path}.weight", name), path)
    return _along(1, rows) if rows.ends else ONE


def _magnitudes(path: str, name: str, names: _Names) -> Factor:
    """DoRA's, [out]: it multiplies rows that are divided by their norm, so that columns must share one factor."""
    factor = names.of(f"{path}.weight", name)
    along = 1 if names.is_transposed(path) or isinstance(names.model.get_submodule(path), nn.Embedding) else 0
    if set(factor.ends) - {along}:
        raise CheckpointError(f"{name} multiplies rows divided by their norm, and {path}.weight is scaled by columns.")
    return _along(0, factor)


def _bias(path: str, name: str, names: _Names) -> Factor:
    """The bias of lora_B: that of the module, whose exponent is also its input's."""
    return names.of(f"{path}.bias", name)


def _new_tokens(path: str, name: str, names: _Names) -> Factor:
    """Rows that take the place of some of the embedding's."""
    factor = names.of(f"{path}.weight", name)
    if 0 in factor.ends:
        raise CheckpointError(f"{name} replaces rows of {path}.weight, which is scaled by rows.")
    return factor


_RULES: dict[str, Callable[[str, str, _Names], Factor]] = {
    ".lora_A.weight": _columns,
    ".lora_B.weight": _rows,
    ".lora_B.bias": _bias,
    ".lora_embedding_A": _embedding_columns,
    ".lora_embedding_B": _embedding_rows,
    ".lora_magnitude_vector": _magnitudes,
    ".lora_magnitude_vector.weight": _magnitudes,
    ".token_adapter.trainable_tokens_delta": _new_tokens,
}


def _split(factor: Factor, path: str) -> tuple[Factor, Factor]:
    """The factor of the rows and that of the columns: their product is `factor`, and the columns' first block is 2^0
    unless the rows are one block.
    """
    if factor.added or set(factor.ends) - {0, 1}:
        raise CheckpointError(f"{path}.weight is scaled in a way that no product of two matrices can follow.")
    high, wide = len(factor.ends.get(0, (0,))), len(factor.ends.get(1, (0,)))
    grid = torch.tensor(factor.exponents).reshape(high, wide)
    rows, columns = grid[:, 0], grid[0] - grid[0, 0]
    if not torch.equal(rows[:, None] + columns, grid):
        raise CheckpointError(
            f"{path}.weight is scaled by blocks that are not the product of one by rows and one by columns."
        )
    return (
        Factor(exponents=tuple(rows.tolist()), ends={0: factor.ends[0]} if high > 1 else {}),
        Factor(exponents=tuple(columns.tolist()), ends={0: factor.ends[1]} if wide > 1 else {}),
    )


def _along(dim: int, factor: Factor) -> Factor:
    """The blocks of a factor that has them in one dimension, in another one."""
    return replace(factor, ends=dict.fromkeys([dim], *factor.ends.values()) if factor.ends else {})


def _exact(name: str, tensor: Tensor, factor: Factor) -> Tensor:
    """The scaled tensor in its own dtype, or in float32 where only that can hold it."""
    if not any(factor.exponents):
        return tensor
    wide = scaled(tensor, factor)
    if not torch.equal(scaled(wide, factor.inverse).to(tensor.dtype), tensor) and not factor.added:
        raise CheckpointError(f"{name}: scaled, some of its numbers are outside the range even of {wide.dtype}.")
    own = wide.to(tensor.dtype)
    return own if torch.equal(own.to(wide.dtype), wide) else wide


def _whole(tensor: Tensor) -> Callable[[], list[Tensor]]:
    return lambda: [tensor]
