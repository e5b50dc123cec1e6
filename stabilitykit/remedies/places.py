"""Where in a model a remedy has to reach: the kit's own Gemma and transformers' have the same names."""

from torch import nn

from stabilitykit.errors import MisuseError


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers. Raises MisuseError for a model that has none."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "layers"]
    layers = next((module for module in found if isinstance(module, nn.ModuleList)), None)
    if layers is None:
        raise MisuseError(f"A remedy is for a decoder with a list called `layers`; {type(model).__name__} has none.")
    return layers
