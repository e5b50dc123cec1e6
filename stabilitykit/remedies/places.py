"""Where a remedy acts in a model, whoever wrote it."""

from typing import Any

from torch import nn

from stabilitykit.recorder.names import site_path
from stabilitykit.recorder.roles import is_norm
from stabilitykit.remedies.seen import Seen

_SCALES = ("scaling", "scale", "softmax_scale")

NO_STACK = "The model has no list of layers, so nothing says where its residual stream is."


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers, one for a decoder, two where there is an encoder: of one class each, with modules in them.

    Lists inside a layer, as of experts, are none.
    """
    found: list[nn.ModuleList] = []
    inside: set[int] = set()
    for module in model.modules():  # a list comes before what it holds
        if id(module) in inside or not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if len({type(layer) for layer in module}) == 1 and next(module[0].children(), None) is not None:
            found.append(module)
            inside.update(map(id, module.modules()))
    return found


def norms(model: nn.Module) -> list[nn.Module]:
    """The modules that normalise, by their name or their class's."""
    return [
        module
        for name, module in model.named_modules()
        if is_norm(name) or type(module).__name__.endswith(("Norm", "LayerNorm"))
    ]


def overflowing_in(seen: Seen, operator: str | None = None) -> list[nn.Module]:
    """The modules in which, while they themselves compute and none inside them, something overflows; only in results
    of that `operator` if one is named.
    """
    sites = {one.module for one in seen.overflowing.values() if operator in (None, one.operator) and "/" in one.site}
    return [module for name, module in seen.model.named_modules() if site_path(name) in sites]


def scale_of(attention: nn.Module) -> str | None:
    """The attribute in which an attention keeps what its scores are multiplied by, a float; None where it has none."""
    return next((name for name in _SCALES if isinstance(getattr(attention, name, None), float)), None)


def width(model: nn.Module) -> int:
    """How many numbers the residual stream has for a token, as the config says; 0 where it says nothing."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(config, "hidden_size", 0) or getattr(config, "d_model", 0))
