"""What a guard looks at in a model: the calls that are steps, the final norm and the layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stabilitykit.recorder.names import site_path
from stabilitykit.remedies.places import norms, stacks


@dataclass(frozen=True, slots=True)
class Places:
    """`wholes` are the modules of which a call is a step, by path: the model and what holds its layers. `norm` is the
    final norm, `layers` are the decoder layers, each with its site; None and empty where the model has none.
    """

    wholes: Mapping[str, nn.Module]
    norm: tuple[str, nn.Module] | None
    layers: tuple[tuple[str, nn.Module], ...]


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile(model)` made, or itself."""
    inner = vars(model).get("_modules", {}).get("_orig_mod")
    return model if inner is None else inner


def places_of(model: nn.Module) -> Places:
    """Of the last list of layers: of an encoder and a decoder, the decoder's."""
    paths = {id(module): name for name, module in model.named_modules()}
    lists = stacks(model)
    if not lists:
        return Places({"": model}, None, ())
    stack = lists[-1]
    path = paths[id(stack)]
    wholes = {outer: model.get_submodule(outer) for outer in _around(path)}
    holder = wholes[path.rpartition(".")[0]]
    of_model = {id(module) for module in norms(model)}
    after = [child for child in holder.children() if child is not stack and id(child) in of_model]
    norm = (site_path(paths[id(after[-1])]), after[-1]) if after else None
    layers = tuple((site_path(f"{path}.{at}"), layer) for at, layer in enumerate(stack))
    return Places(wholes, norm, layers)


def _around(path: str) -> Iterator[str]:
    """The paths of what holds a module, the outermost, "", first."""
    parts = path.split(".")[:-1]
    yield from (".".join(parts[:count]) for count in range(len(parts) + 1))


def logits_of(output: Any) -> Tensor | None:
    """The logits [B, T, V] in what a model returns, or None: a tensor alone, a field `logits`, the first of a tuple, or
    the second after a loss. A classifier's field may be [B, C].
    """
    if isinstance(output, Tensor):
        return output if _are_logits(output) else None
    if isinstance(output, tuple) and not hasattr(output, "logits"):
        return next((one for one in output[:2] if _are_logits(one)), None)
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if _are_logits(found, least=2) else None


def _are_logits(found: Any, least: int = 3) -> bool:
    return isinstance(found, Tensor) and found.is_floating_point() and least <= found.ndim <= 3


def with_logits(output: Any, logits: Tensor) -> Any:
    """The same output with other logits; of a class of its own, changed in place."""
    if isinstance(output, Tensor):
        return logits
    if isinstance(output, tuple) and not hasattr(output, "logits"):
        at = next(at for at, one in enumerate(output) if _are_logits(one))
        return (*output[:at], logits, *output[at + 1 :])
    if isinstance(output, Mapping):
        output["logits"] = logits  # type: ignore[index]
    else:
        output.logits = logits
    return output
