"""Where a remedy acts in a model: the kit's own Gemma and those of transformers use the same names."""

from torch import nn

from stabilitykit.errors import MisuseError


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers. Raises MisuseError for a model without one."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "layers"]
    layers = next((module for module in found if isinstance(module, nn.ModuleList)), None)
    if layers is None:
        raise MisuseError(
            f"A remedy needs a decoder with a ModuleList named `layers`; {type(model).__name__} has none."
        )
    return layers
