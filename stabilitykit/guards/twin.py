"""A second set of modules over the same weights, which hooks can be put on while other threads run the first."""

import copy

import torch
from torch import Tensor, nn


def twin(model: nn.Module) -> nn.Module:
    """`model` again, with every tensor shared and every module and setting its own; hooks come along.

    torch looks a module's hooks up while it runs, so that a hook that comes or goes meanwhile breaks the call of
    another thread. Raises what copying raises, for a module that cannot be copied.
    """
    shared: dict[int, object] = {}
    for module in model.modules():
        for held in (vars(module), module._parameters, module._buffers):
            shared |= {id(one): one for one in held.values() if isinstance(one, Tensor)}
    with torch.no_grad():
        return copy.deepcopy(model, shared)
