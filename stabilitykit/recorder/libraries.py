"""What else ran, besides torch: the libraries whose classes a model is made of, its checkpoint and its attention."""

import sys
from typing import Any

from torch import nn

_OWN = ("torch", "stabilitykit", "builtins", "__main__")


def library_versions(model: nn.Module) -> dict[str, str]:
    """The versions of the libraries that the model's modules are classes of, with what those classes derive from.

    Code of a user's own has none, and a library that does not say its version is left out. accelerate is named where
    its hooks move the model's weights.
    """
    modules = list(model.modules())
    classes = {base for kind in {type(module) for module in modules} for base in kind.__mro__}
    roots = {str(kind.__module__).partition(".")[0] for kind in classes}
    roots |= {"accelerate"} if any(hasattr(module, "_hf_hook") for module in modules) else set()
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in sorted(roots - set(_OWN))}
    return {name: version for name, version in found.items() if isinstance(version, str)}


def checkpoint_of(model: nn.Module) -> str | None:
    """Where the weights come from, as a command line names it; None where the model does not say.

    A model of transformers' knows what it was loaded from, and not what was done to its weights since.
    """
    source = getattr(model, "source", None)
    if isinstance(source, str):
        return source
    name = getattr(_config(model), "_name_or_path", None)
    return f"hf:{name}" if isinstance(name, str) and name else None


def attention_of(model: nn.Module) -> str | None:
    """transformers' name of the attention that runs: `eager`, `sdpa` or another; None of other models."""
    name = getattr(_config(model), "_attn_implementation", None)
    return name if isinstance(name, str) else None


def _config(model: nn.Module) -> Any:
    """transformers' config, of a model of peft's that of the model in it."""
    return getattr(model, "config", None)
